"""How fast it is on this machine's devices, beside their peaks and PyTorch: `ur-jax throughput`.

python experiments/throughput.py --against torch --out runs/throughput
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("throughput"))
