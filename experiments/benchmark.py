"""The benchmark: every encoder through every stage, resumable, on any number of hosts.

    python experiments/benchmark.py --preset quick --encoders demo mine=file.py:make

The same as `ur-jax benchmark`; see `ur_jax/jobs/benchmark.py` and `README.md` beside this file.
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("benchmark"))
