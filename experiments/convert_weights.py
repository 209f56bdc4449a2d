"""A published PyTorch file as a checkpoint that needs no PyTorch: `ur-jax convert-weights`.

python experiments/convert_weights.py --list
python experiments/convert_weights.py --encoder mocov2 --source FILE --out DIRECTORY
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("convert-weights"))
