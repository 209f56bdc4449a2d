"""The label-free table of one encoder, with plots and per-image values: `ur-jax evaluate`.

python experiments/evaluate.py --encoder demo --images demo --preset quick --out runs/demo
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("evaluate"))
