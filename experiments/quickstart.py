"""Sees label-free robustness happen: the demo encoder on the demo images, in minutes on a laptop.

python experiments/quickstart.py
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import command
import evaluate


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing needs to be given."""

    out: Path = Path("runs/quickstart")
    """Folder of the results; a run that stopped there goes on."""


def main(config: Config) -> None:
    started = time.monotonic()
    quick = evaluate.PRESETS["quick"]
    evaluate.main(dataclasses.replace(quick, encoder="demo", images="demo", out=config.out))
    command.console.print(
        f"""
That took {time.monotonic() - started:.0f} s. Look at {config.out}/gallery.png: perturbations of at
most 0.05 move an image's representation (a ResNet-20 trained without labels) to those of others.

Next:
  your own images      python experiments/evaluate.py --preset quick --encoder demo \\
                           --images folder:PHOTOS --out runs/mine
  a published encoder  python experiments/convert_weights.py --list
  your own encoder     README, "Your own encoder"
  all flags            python experiments/evaluate.py --help""",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    command.run(main, Config)
