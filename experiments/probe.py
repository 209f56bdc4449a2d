"""A linear probe of an encoder, trained and tested: `ur-jax probe`.

python experiments/probe.py --encoder demo --images folder:cifar10/train \\
    --test-images folder:cifar10/test --kind noisy --cached --out runs/noisy
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("probe"))
