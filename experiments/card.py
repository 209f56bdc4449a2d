"""A section for a model's card, and the block that model hubs read: `ur-jax card`.

python experiments/card.py runs/bench/demo
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("card"))
