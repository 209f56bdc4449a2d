"""The label-free table of one encoder, with plots and per-image values.

    python experiments/evaluate.py --encoder demo --images demo --preset quick --out runs/demo

Writes to --out: `summary.json` (value, interval and n of every metric, with what made them),
`attacks.parquet`, `pairs.parquet`, `neighbours.parquet` (per image), `distances.parquet` (the
distribution of clean distances), `distances.png`, `margins.png`, `gallery.png`. A killed run
resumes where it stopped and ends with the same numbers. On several hosts start the same command on
each: batches are divided over the hosts, a batch over each host's devices.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import command
import jax
import numpy as np
import tyro
from jax.sharding import Mesh

import ur_jax
from ur_jax import data, evaluation, hosts, loading, records, report, results, sharding
from ur_jax.evaluation import STAGES, EvaluationConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoder, which images, where to; the protocol's own flags follow."""

    encoder: str = tyro.MISSING
    """Checkpoint directory, published file (with --name), or an encoder that ships: demo."""
    images: str = tyro.MISSING
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    out: Path = tyro.MISSING
    """Folder of the results; a run that stopped there goes on."""
    preset: str = "paper"
    """paper (its protocol) or quick (minutes on a laptop)."""
    name: str | None = None
    """Which encoder a published file holds."""
    representation: str = "paper"
    """paper, backbone, projection or another output of the network."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    num_workers: int = 0
    """Processes that decode images; more than 0 pays on many cores."""
    stages: tuple[Literal["distances", "attacks", "overlap", "breakaway"], ...] = STAGES
    """What to evaluate."""
    clean: Path | None = None
    """Folder of clean representations that several runs share; --out keeps its own otherwise."""
    protocol: tyro.conf.OmitArgPrefixes[EvaluationConfig] = EvaluationConfig()


PRESETS = {
    "paper": Config(),
    "quick": Config(
        preset="quick",
        protocol=EvaluationConfig(num_images=64, read_at=(5, 10, 20), num_distribution=None),
    ),
}


def main(config: Config) -> None:
    with hosts.before_merge():
        run = compute(config)
    if hosts.is_first():
        finish(config, *run)


def compute(config: Config):
    """Computes this host's share; returns what `finish` takes."""
    encoder = ur_jax.load_encoder(config.encoder, config.name, config.representation, config.dtype)
    source = data.open_images(config.images)
    mesh = sharding.data_mesh()
    protocol = settle(config, encoder, mesh)
    evaluation.check_fits(protocol, source, mesh)  # before the folder is claimed
    described = {
        **loading.described(encoder),
        "images": config.images,
        "listing_hash": source.listing_hash,
        "protocol": protocol.of_stages(config.stages),
    }
    if config.stages != STAGES:
        described["stages"] = config.stages
    run, bank = records.open_run(config.out, described), None
    if config.clean is not None:
        num_images = protocol.num_clean or len(source)
        bank = evaluation.open_bank(config.clean, described, num_images, protocol.batch_size)
    evaluation.compute(
        encoder,
        source,
        run,
        config=protocol,
        stages=config.stages,
        bank=bank,
        host=jax.process_index(),
        num_hosts=jax.process_count(),
        mesh=mesh,
        num_workers=config.num_workers,
        progress=command.progress,
    )
    return encoder, source, run, bank, described


def settle(config: Config, encoder: ur_jax.Encoder, mesh: Mesh) -> EvaluationConfig:
    """The protocol with a batch size: what fits on every host, or what the run began with."""
    protocol, claim = config.protocol, records.as_folder(config.out) / "config.json"
    if protocol.batch_size is not None:
        return protocol
    begun = records.read_json(claim) if claim.exists() else {}
    size = begun.get("protocol", {}).get("batch_size")
    if size is None:
        fitting = evaluation.fit_batch_size(protocol, encoder, mesh, jax.process_count())
        size = int(hosts.on_all_hosts(fitting).min())
    return dataclasses.replace(protocol, batch_size=size)


def finish(config: Config, encoder, source, run, bank, described) -> None:
    """Writes the tables, the plots and the summary of all hosts' parts."""
    result = evaluation.merge(run, config=config.protocol, stages=config.stages, bank=bank)
    plot(config, encoder, source, result.gallery)
    records.write_json(
        config.out / "summary.json",
        {
            **records.provenance(),
            "config": described,
            "metrics": [
                results.row(m.metric, m.estimate, divergence=m.divergence, eps=m.eps, step=m.step)
                for m in result.measurements
            ],
            "unreadable": result.unreadable,
        },
    )
    title = f"{encoder.name} ({encoder.representation}) on {config.images}"
    command.console.print(report.label_free_table(title, result.measurements))
    if result.unreadable:
        command.console.print(f"{len(result.unreadable)} unreadable images were left out.")
    command.console.print(f"Results in {config.out}", highlight=False)


def plot(config: Config, encoder, source, gallery: dict[str, np.ndarray]) -> None:
    """Writes the plots of a finished run."""
    out = config.out
    if "attacks" in config.stages:
        report.plot_distances(out / "distances.png", records.read_table(out / "attacks.parquet"))
    if "overlap" in config.stages:
        report.plot_margins(out / "margins.png", records.read_table(out / "pairs.parquet"))
    if "breakaway" not in config.stages:
        return
    rows = gallery["neighbours"]
    decoded = data.load_uint8(
        source, rows.ravel(), input_size=encoder.input_size, preparation=encoder.preparation
    ).images
    report.plot_gallery(
        out / "gallery.png",
        gallery["images"],
        gallery["attacked_images"],
        decoded.reshape(*rows.shape, *decoded.shape[1:]) / 255.0,
        rows == gallery["index"][:, None],
    )


if __name__ == "__main__":
    command.run(main, Config, PRESETS)
