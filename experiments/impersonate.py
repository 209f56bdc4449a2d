"""Impersonation: do attacked cats pass for dogs, and dogs for cats: `ur-jax impersonate`.

python experiments/impersonate.py --encoder demo --probe runs/standard/probe \\
    --images folder:cifar10/test --first cat --second dog --out runs/impersonate
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("impersonate"))
