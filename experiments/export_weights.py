"""An encoder that was trained here as a PyTorch state dict: `ur-jax export-weights`.

python experiments/export_weights.py --encoder runs/mine/encoder --out mine.safetensors
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("export-weights"))
