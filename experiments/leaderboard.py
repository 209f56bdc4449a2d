"""Results of several places as one page and one table: `ur-jax leaderboard`.

python experiments/leaderboard.py ours/bench theirs/bench --out board
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("leaderboard"))
