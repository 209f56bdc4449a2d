"""Fixed, exact and adaptive certificates side by side: `ur-jax compare-certificates`.

python experiments/compare_certificates.py --encoder demo --images demo --num-images 4
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("compare-certificates"))
