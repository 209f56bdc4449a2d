"""Certificates of one encoder on many images, with plots and per-image values: `ur-jax certify`.

python experiments/certify.py --encoder demo --images demo --method center --out runs/center
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("certify"))
