"""The paper's headline at CIFAR scale: does adversarial training without labels give robustness?

    python experiments/reproduce_cifar.py --data cifar10 --out runs/cifar

From nothing but the images (--data holds train/CLASS/* and test/CLASS/*): fine-tunes encoder "demo"
by MoCo v2 with the untargeted, targeted and loss attack and by FARE, trains the three probes on
each and on "demo", and measures all of them: the label-free table, certified accuracy and radius
(noisy probe), certified divergence, impersonation of cats and dogs. Every step is one of the other
scripts, in a folder of its own, OUT/ENCODER/STEP; a killed run goes on where it stopped.

Writes OUT/RESULTS.csv (encoder, step, metric, value, interval, n), OUT/table.md and OUT/figure.png.

The copies of CIFAR-10 that this was run on are JPEG files: numbers do not compare with published
CIFAR-10 figures. Nothing was tuned on the test images.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import certify
import command
import evaluate
import impersonate
import probe
import train

from ur_jax import records, report
from ur_jax.attacks import AttackConfig
from ur_jax.certify import CenterConfig, RandomizedConfig
from ur_jax.data import ViewConfig
from ur_jax.evaluation import EvaluationConfig
from ur_jax.impersonation import ImpersonationConfig
from ur_jax.intervals import Estimate
from ur_jax.probe import ProbeConfig

PROBES = ("standard", "noisy", "low_pass")
ATTACK_METRICS = (
    "cosine_similarity", "universal_quantile", "normalised_distance",
    "universal_quantile_targeted", "relative_quantile",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """How much of everything; the defaults took about 80 minutes on two CPU cores."""

    data: Path
    """Folder with train/ and test/, a sub-folder per class in each."""
    out: Path
    """Folder of the results; a run that stopped there goes on."""
    encoders: tuple[str, ...] = ("demo", "untargeted", "targeted", "loss", "fare")
    """The encoder to begin with, and its fine-tunings by attack."""
    num_train: int = 30_000
    """Evenly spaced training images of the fine-tuning."""
    num_epochs: int = 1
    batch_size: int = 128
    num_probe: int = 10_000
    """Evenly spaced training images of the probes."""
    num_test: int = 2_000
    """Evenly spaced test images that probes are tested on, and that neighbours are looked up in."""
    num_attacked: int = 64
    """Evenly spaced test images attacked for the label-free table; impersonated in a direction."""
    num_certified: int = 100
    """Evenly spaced test images of the certified accuracy."""
    num_center: int = 16
    """Evenly spaced test images of the certified divergence."""
    adversary: AttackConfig = AttackConfig(eps=0.05, step_size=0.02, num_steps=3)
    """The attack inside training."""
    attack_steps: tuple[int, ...] = (5, 10, 30, 50)
    """Steps at which the label-free attacks are read."""
    samples: int = 1_000
    """Noisy images per certificate."""

    def __post_init__(self):
        for split in ("train", "test"):
            if not (self.data / split).is_dir():
                raise ValueError(f"Expected --data with a folder {split}/ in it, got {self.data}.")


def main(config: Config) -> None:
    records.open_run(config.out, dataclasses.asdict(config) | {"out": "", "data": ""})
    for name, title, run in steps(config):
        done = config.out / name / title / "done"
        if not done.exists():
            command.console.rule(f"{name}: {title}")
            run()
            with records.atomic_path(done) as temporary:
                temporary.write_text("")
    rows = list(results(config))
    with records.atomic_path(config.out / "RESULTS.csv") as temporary:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    table = report.encoder_table(headline(rows), config.encoders)
    with records.atomic_path(config.out / "table.md") as temporary:
        temporary.write_text(report.as_markdown(table))
    report.plot_encoders(config.out / "figure.png", *curves(config, rows))
    command.console.print(table)
    command.console.print(f"Results in {config.out}", highlight=False)


def checkpoint(config: Config, name: str) -> str:
    """What `load_encoder` takes for one of the encoders."""
    return name if name == "demo" else str(config.out / name / "train" / "encoder")


def steps(config: Config) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Yields (encoder, step, what runs it) in order: all training first."""
    for name in config.encoders:
        if name != "demo":
            yield name, "train", lambda name=name: train.main(training(config, name))
    test, images = (f"folder:{config.data / split}" for split in ("test", "train"))
    for name in config.encoders:
        encoder, out = checkpoint(config, name), config.out / name
        for kind in PROBES:
            settings = probe.Config(
                encoder=encoder, images=images, test_images=test, out=out / f"probe_{kind}",
                num_images=config.num_probe, num_test_images=config.num_test, cached=True,
                num_draws=2 if kind == "noisy" else 1,
                views=ViewConfig(kind=kind, augment=False),
                training=ProbeConfig(learning_rate=0.1, batch_norm=True),
            )  # fmt: skip
            yield name, f"probe_{kind}", lambda settings=settings: probe.main(settings)
        settings = evaluate.Config(
            encoder=encoder, images=test, out=out / "label_free",
            protocol=EvaluationConfig(
                num_images=config.num_attacked, num_clean=config.num_test, num_distribution=None,
                read_at=config.attack_steps,
            ),
        )  # fmt: skip
        yield name, "label_free", lambda settings=settings: evaluate.main(settings)
        settings = certify.Config(
            encoder=encoder, representation="features", images=test, out=out / "certified",
            method="randomized", probe=str(out / "probe_noisy" / "probe"),
            num_images=config.num_certified, randomized=RandomizedConfig(n=config.samples),
        )  # fmt: skip
        yield name, "certified", lambda settings=settings: certify.main(settings)
        settings = certify.Config(
            encoder=encoder, images=test, out=out / "center", num_images=config.num_center,
            num_distribution=config.num_test,
            center=CenterConfig(n0=1200, n=max(config.samples, 1000)),
        )  # fmt: skip
        yield name, "center", lambda settings=settings: certify.main(settings)
        settings = impersonate.Config(
            encoder=encoder, images=test, out=out / "impersonate",
            probe=str(out / "probe_standard" / "probe"),
            attack=ImpersonationConfig(num_images=config.num_attacked),
        )  # fmt: skip
        yield name, "impersonate", lambda settings=settings: impersonate.main(settings)


def training(config: Config, name: str) -> train.Config:
    """The fine-tuning of one encoder."""
    shared = dict(
        images=f"folder:{config.data / 'train'}", out=config.out / name / "train", init="demo",
        num_images=config.num_train, num_epochs=config.num_epochs, batch_size=config.batch_size,
        adversary=config.adversary, warmup_epochs=0.1,
    )  # fmt: skip
    if name == "fare":
        fare = train.PRESETS["fare"]
        return dataclasses.replace(fare, **shared, learning_rate=1e-3)
    return train.Config(**shared, attack=name, learning_rate=0.03)


def results(config: Config) -> Iterator[dict[str, Any]]:
    """Yields one row per number of every step's summary."""
    for name in config.encoders:
        for path in sorted((config.out / name).glob("*/summary.json")):
            metrics = json.loads(path.read_text())["metrics"]
            entries = metrics if isinstance(metrics, list) else [
                {"metric": metric, **estimate} for metric, estimate in metrics.items()
            ]  # fmt: skip
            for entry in entries:
                columns = ("metric", "divergence", "images", "direction", "eps", "step")
                numbers = ("value", "low", "high", "n")
                row = {"encoder": name, "stage": path.parent.name}
                yield row | {column: entry.get(column) for column in (*columns, *numbers)}


def headline(rows: list[dict[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """The rows of the printed table: {measure: {encoder: estimate}}."""
    table: dict[str, dict[str, Estimate]] = {}
    last = max(row["step"] for row in rows if row["metric"] == "universal_quantile")
    for row in rows:
        stage, metric, name = row["stage"], row["metric"], None
        if stage.startswith("probe_"):
            kind = stage.removeprefix("probe_")
            name = f"{metric}, {kind} probe" if row["images"] != "clean" else None
        elif stage == "label_free":
            at_end = row["step"] == last or metric not in ATTACK_METRICS
            if row["divergence"] in ("l2", None) and at_end:
                name = f"{metric}, eps {row['eps']:g}, step {row['step']}"
        elif stage == "impersonate":
            if row["direction"] == "both":
                name = f"impersonation, eps 0.1, step {row['step']}"
        elif stage == "certified":
            name = None if metric == "certified" else f"{metric} (noisy probe)"
        elif stage == "center":
            name = f"center smoothing: {metric}"
        if name is not None:
            estimate = Estimate(*(row[column] for column in Estimate._fields))
            table.setdefault(name, {})[row["encoder"]] = estimate
    return table


def curves(config: Config, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of each encoder: columns of its certificates, and impersonation success by step."""
    certificates = {
        name: records.read_table(config.out / name / "certified" / "certificates.parquet")
        for name in config.encoders
    }
    successes = {
        name: [
            (row["step"], Estimate(*(row[column] for column in Estimate._fields)))
            for row in rows
            if row["encoder"] == name and row["direction"] == "both"
        ]
        for name in config.encoders
    }
    return certificates, successes


if __name__ == "__main__":
    command.run(main, Config)
