"""Certificates of one encoder on many images, as a batch job that can be killed at any moment.

    python experiments/certify.py --encoder demo --images demo --method center --out runs/center
    python experiments/certify.py --encoder demo --images folder:photos --method randomized \
        --probe runs/noisy_probe --out runs/randomized

Center smoothing bounds how far the smoothed representation moves; randomized smoothing certifies
the class of a probe. `--probe nearest` needs no labels: the classes are the images themselves, and
a noisy image counts for the one whose clean representation is nearest (l2). What is certified then
is that the smoothed encoder still tells an image from all others.

Writes to --out: `certificates.parquet` (one row per image: the certificate and the raw counts it
follows from), `times.parquet` (seconds per image: the only file that differs between runs),
`summary.json` (with 95 % intervals) and the curve as `curves.png`. Finished images are written
every few seconds and skipped when the same command is started again; the table is the same, byte
for byte. On several hosts start the same command on each: images are divided over the hosts, the
samples of an image over each host's devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import command
import jax
import tyro

import ur_jax
from ur_jax import data, runs
from ur_jax.certify import CenterConfig, RandomizedConfig
from ur_jax.devices import hosts
from ur_jax.encoders import Encoder, checkpoints, loading
from ur_jax.errors import UserError
from ur_jax.jobs import certify as certification
from ur_jax.jobs import label_free
from ur_jax.jobs.certify import Figures
from ur_jax.report import collect as results
from ur_jax.report import plots as report


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoder, which images, which certificate, where to."""

    encoder: str = tyro.MISSING
    """Checkpoint directory, published file (with --name), or an encoder that ships: demo."""
    images: str = tyro.MISSING
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    out: Path = tyro.MISSING
    """Folder of the results; a run that stopped there goes on."""
    method: Literal["center", "randomized"] = "center"
    preset: str = "adaptive"
    """adaptive, quick (the same, smaller) or paper (fixed numbers of samples)."""
    num_images: int = 200
    """Evenly spaced subset of the images."""
    seed: int = 0
    name: str | None = None
    """Which encoder a published file holds."""
    representation: str = "paper"
    """paper, backbone, projection or another output of the network."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    probe: str | None = None
    """Of randomized: checkpoint directory of a linear probe, or nearest."""
    batch_size: int | None = None
    """Samples per device and forward pass; by default from the device's memory."""
    num_distribution: int = 100_000
    """Of center: clean images, at most, of the distance distribution F."""
    clean: Path | None = None
    """Folder of clean representations that several runs share; --out keeps its own otherwise."""
    center: CenterConfig = CenterConfig(bound="union")
    randomized: RandomizedConfig = RandomizedConfig(bound="union")


PRESETS = {
    "adaptive": Config(),
    "quick": Config(
        preset="quick",
        num_images=16,
        num_distribution=512,
        center=CenterConfig(bound="union", n0=1000, n=10_000),
        randomized=RandomizedConfig(bound="union", n=10_000),
    ),
    "paper": Config(
        preset="paper", center=CenterConfig(bound="hoeffding"), randomized=RandomizedConfig()
    ),
}


def main(config: Config) -> None:
    with hosts.before_merge():
        job, described = compute(config)
    if hosts.is_first():
        finish(config, job, described)


def compute(config: Config) -> tuple[certification.Job, dict[str, Any]]:
    """Certifies this host's share; returns the job and what the results depend on."""
    encoder = ur_jax.load_encoder(config.encoder, config.name, config.representation, config.dtype)
    source = data.open_images(config.images)
    indices = data.evenly_spaced(len(source), config.num_images)
    is_center = config.method == "center"
    settings = config.center if is_center else config.randomized
    probe = None if is_center else read_probe(config.probe, encoder)
    described = {
        **loading.described(encoder),
        "images": config.images,
        "listing_hash": source.listing_hash,
        "num_images": config.num_images,
        "seed": config.seed,
        "method": config.method,
        "settings": settings,
    }
    if is_center:
        described["num_distribution"] = config.num_distribution
    else:
        probe_hash = None if probe is None else checkpoints.tree_hash(probe)
        described |= {"probe": config.probe, "probe_sha256": probe_hash}
    run = runs.open_run(config.out, described)
    bank = None
    if is_center and config.clean is not None:
        num_images = min(len(source), config.num_distribution)
        bank = label_free.open_bank(config.clean, described, num_images, certification.BANK_BATCH)
    job = certification.Job(
        encoder, source, indices, run, settings, probe, config.seed, command.progress, bank
    )
    with progress_line() as on_progress:
        job.certify(
            host=jax.process_index(),
            num_hosts=jax.process_count(),
            batch_size=config.batch_size,
            on_progress=on_progress,
        )
    return job, described


def read_probe(probe: str | None, encoder: Encoder) -> dict[str, Any] | None:
    """Reads the probe that the flag names; None if it is "nearest", which has nothing to read."""
    if probe is None:
        raise UserError(
            "Expected --probe with --method randomized: a checkpoint directory of a linear probe, "
            "or nearest, which needs no labels."
        )
    return None if probe == "nearest" else certification.load_probe(probe, encoder)


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[Figures], None]]:
    """Shows figures on one line; on a new one every 30 seconds where nobody watches."""
    status, text, shown = command.console.status(""), "", time.monotonic()

    def on_progress(figures: Figures) -> None:
        nonlocal text, shown
        num_images, num_done, num_certified, rate, left = figures
        text = f"{num_done}/{num_images} images, {num_certified} certified, {rate:,.0f} samples/s"
        text += ", time left unknown" if left is None else f", {left:.0f} s left"
        status.update(text)
        status.start()  # not before there is something to show: the encoding has its own bar
        if not command.console.is_terminal and time.monotonic() - shown > 30:
            shown = time.monotonic()
            command.console.print(text, highlight=False)

    try:
        yield on_progress
    finally:
        status.stop()
        if text:  # nothing where it failed before the first sample
            command.console.print(text, highlight=False)


def finish(config: Config, job: certification.Job, described: dict[str, Any]) -> None:
    """Writes the tables, the curves and the summary of all hosts' certificates."""
    result = job.finish(config.num_distribution)
    plot = report.plot_eps_out if config.method == "center" else report.plot_radii
    certificates = runs.read_table(config.out / "certificates.parquet")
    plot(config.out / "curves.png", certificates)
    runs.write_json(
        config.out / "summary.json",
        {
            **runs.provenance(),
            "config": described,
            "metrics": results.named_rows(result.estimates),
            "samples": result.num_samples,
            "unreadable": result.unreadable,
        },
    )
    title = f"{config.method} certificates of {config.encoder} on {config.images}"
    command.console.print(report.certificate_table(title, result.estimates))
    command.console.print(
        f"{result.num_samples:,} samples, {result.num_samples / len(certificates['index']):,.0f} "
        f"per image. Results in {config.out}",
        highlight=False,
    )


if __name__ == "__main__":
    command.run(main, Config, PRESETS)
