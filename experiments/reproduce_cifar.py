"""The paper's headline at CIFAR scale: does adversarial training without labels give robustness?

    python experiments/reproduce_cifar.py --data cifar10 --workdir runs/cifar

From nothing but the images (--data holds train/CLASS/* and test/CLASS/*): fine-tunes encoder "demo"
by MoCo v2 with the untargeted, targeted and loss attack and by FARE (`train.py`), then runs the
benchmark (`benchmark.py --preset cifar`) on "demo" and all four: the label-free table, three
probes, certified accuracy and radius (noisy probe), certified divergence, impersonation of cats and
dogs. A killed run goes on where it stopped.

Writes WORKDIR/training/NAME/encoder, the benchmark's folders, RESULTS.csv, report.html, figures/
and the headline as table.md.

The copies of CIFAR-10 that this was run on are JPEG files: numbers do not compare with published
CIFAR-10 figures. Nothing was tuned on the test images.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmark
import command
import train

from ur_jax import runs
from ur_jax.attacks import AttackConfig
from ur_jax.errors import UserError
from ur_jax.report import collect as results
from ur_jax.report import plots as report
from ur_jax.stats.intervals import Estimate


@dataclasses.dataclass(frozen=True)
class Config:
    """How much of everything."""

    data: Path
    """Folder with train/ and test/, a sub-folder per class in each."""
    workdir: Path
    """Folder of the results; a run that stopped there goes on."""
    fine_tunings: tuple[str, ...] = ("untargeted", "targeted", "loss", "fare")
    """Attacks of MoCo v2, and fare."""
    num_train: int = 30_000
    """Evenly spaced training images of the fine-tuning."""
    num_epochs: int = 1
    batch_size: int = 128
    adversary: AttackConfig = AttackConfig(eps=0.05, step_size=0.02, num_steps=3)
    """The attack inside training."""
    benchmark: benchmark.Config = benchmark.PRESETS["cifar"]
    """What is measured afterwards; its images and encoders are filled in."""

    def __post_init__(self):
        for split in ("train", "test"):
            if not (self.data / split).is_dir():
                raise UserError(f"Expected --data with a folder {split}/ in it, got {self.data}.")


def main(config: Config) -> int:
    for name in config.fine_tunings:
        command.console.rule(f"training: {name}")
        train.main(training(config, name))
    tuned = [
        f"{name}={config.workdir / 'training' / name / 'encoder'}" for name in config.fine_tunings
    ]
    test, images = (f"folder:{config.data / split}" for split in ("test", "train"))
    measured = dataclasses.replace(
        config.benchmark, workdir=config.workdir, encoders=("demo", *tuned), images=test,
        train_images=images,
    )  # fmt: skip
    status = benchmark.main(measured)
    table = report.encoder_table(
        headline(results.collect(config.workdir).rows), ("demo", *config.fine_tunings)
    )
    with runs.atomic_path(config.workdir / "table.md") as temporary:
        temporary.write_text(report.as_markdown(table))
    command.console.print(f"The headline: {config.workdir / 'table.md'}", highlight=False)
    return status


def training(config: Config, name: str) -> train.Config:
    """The fine-tuning of one encoder."""
    shared = dict(
        images=f"folder:{config.data / 'train'}", out=config.workdir / "training" / name,
        init="demo", num_images=config.num_train, num_epochs=config.num_epochs,
        batch_size=config.batch_size, adversary=config.adversary, warmup_epochs=0.1,
    )  # fmt: skip
    if name == "fare":
        return dataclasses.replace(train.PRESETS["fare"], **shared, learning_rate=1e-3)
    return train.Config(**shared, attack=name, learning_rate=0.03)


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """The rows of the headline: {measure: {encoder: estimate}}, attacks at their last step."""
    last = {}
    for row in rows:
        key = row["stage"], row["metric"], row["eps"]
        last[key] = max(last.get(key, 0), row["step"] or 0)
    table: dict[str, dict[str, Estimate]] = {}
    for row in rows:
        stage, metric = row["stage"], row["metric"]
        if row["divergence"] not in ("l2", None):
            continue
        if stage != "impersonation" and (row["step"] or 0) < last[stage, metric, row["eps"]]:
            continue
        # A probe on its own kind of images; impersonation in both directions together.
        if row["images"] not in (None, "both", stage.removeprefix("probe-")):
            continue
        settings = {name: row[name] for name in ("eps", "step", "radius") if row[name] is not None}
        shown = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        name = f"{stage}: {metric}{f' ({shown})' if shown else ''}"
        estimate = Estimate(*(row[field] for field in Estimate._fields))
        table.setdefault(name, {})[row["encoder"]] = estimate
    return table


if __name__ == "__main__":
    sys.exit(command.run(main, Config))
