"""Trains an encoder without labels, or fine-tunes one adversarially: `ur-jax train`.

python experiments/train.py --images folder:cifar10/train --out runs/demo
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("train"))
