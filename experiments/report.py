"""The report of a working directory, as one HTML file, and all numbers as CSV: `ur-jax report`.

python experiments/report.py runs/cifar
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("report"))
