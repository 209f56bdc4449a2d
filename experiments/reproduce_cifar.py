"""The paper's headline at CIFAR scale: `ur-jax reproduce-cifar`.

python experiments/reproduce_cifar.py --data cifar10 --workdir runs/cifar
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("reproduce-cifar"))
