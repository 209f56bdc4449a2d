"""What each attack finds at which cost: `ur-jax attack-table`.

python experiments/attack_table.py --encoders demo --images demo --num-images 8 --eps 0.05
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("attack-table"))
