"""k-nearest-neighbour accuracy of an encoder, beside that of the raw pixels: `ur-jax knn`.

python experiments/knn.py --encoder demo \\
    --images folder:cifar10/train --test-images folder:cifar10/test
"""

import sys

from ur_jax import cli

if __name__ == "__main__":
    sys.exit(cli.run("knn"))
