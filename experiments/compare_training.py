"""Ways to make an encoder robust, at equal gradient steps: `ur-jax compare-training`.

python experiments/compare_training.py --images demo --test-images demo --workdir runs/methods
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("compare-training"))
