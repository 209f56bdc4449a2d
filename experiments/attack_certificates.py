"""Is any certified image moved farther than its certificate says? `ur-jax attack-certificates`.

python experiments/attack_certificates.py --encoder demo --images demo --out runs/attacked
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("attack-certificates"))
