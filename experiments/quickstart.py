"""Sees label-free robustness happen: the demo encoder on the demo images, in minutes on a laptop.

python experiments/quickstart.py
"""

import sys
import time

from ur_jax import cli

NEXT = """
That took {seconds:.0f} s. Look at runs/quickstart/gallery.png: perturbations of at most 0.05 move
an image's representation (a ResNet-20 trained without labels) to those of others.

Next:
  your own images      ur-jax evaluate --preset quick --encoder demo --images folder:PHOTOS \\
                           --out runs/mine
  a published encoder  ur-jax convert-weights --list
  your own encoder     ur-jax evaluate --preset quick --encoder file.py:make --images demo \\
                           --out runs/own; experiments/own_encoder.py is one
  all flags            ur-jax evaluate --help"""


if __name__ == "__main__":
    started = time.monotonic()
    flags = "--encoder demo --images demo --preset quick --out runs/quickstart"
    status = cli.run("evaluate", [*flags.split(), *sys.argv[1:]])
    if status == 0:
        print(NEXT.format(seconds=time.monotonic() - started))
    sys.exit(status)
