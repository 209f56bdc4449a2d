"""The label-free table of one encoder, with plots and per-image values.

    python experiments/evaluate.py --encoder demo --images demo --preset quick --out runs/demo

Writes to --out: `summary.json` (value, interval and n of every metric, with what made them),
`attacks.parquet`, `pairs.parquet`, `neighbours.parquet` (per image), `distances.png`,
`margins.png`, `gallery.png`. A killed run resumes where it stopped and ends with the same numbers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import command
import numpy as np
import tyro

import ur_jax
from ur_jax import data, evaluation, records, report, sharding
from ur_jax.evaluation import EvaluationConfig


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
    protocol: tyro.conf.OmitArgPrefixes[EvaluationConfig] = EvaluationConfig()


PRESETS = {
    "paper": Config(),
    "quick": Config(
        preset="quick",
        protocol=EvaluationConfig(num_images=64, read_at=(5, 10, 20), num_distribution=None),
    ),
}


def main(config: Config) -> None:
    encoder = ur_jax.load_encoder(config.encoder, config.name, config.representation, config.dtype)
    source = data.open_images(config.images)
    mesh = sharding.data_mesh()
    evaluation.check_fits(config.protocol, source, mesh)  # before the folder is claimed
    described = {
        "encoder": encoder.name,
        "representation": encoder.representation,
        "dtype": encoder.dtype,
        "weights_sha256": ur_jax.weights_hash(encoder),
        "images": config.images,
        "listing_hash": source.listing_hash,
        "protocol": config.protocol,
    }
    run = records.open_run(config.out, described)
    result = evaluation.evaluate(
        encoder,
        source,
        run,
        config=config.protocol,
        mesh=mesh,
        num_workers=config.num_workers,
        progress=command.progress,
    )
    records.write_json(
        config.out / "summary.json",
        {
            **records.provenance(),
            "config": described,
            "metrics": [m._asdict() | m.estimate._asdict() for m in result.measurements],
            "unreadable": result.unreadable,
        },
    )
    plot(config.out, encoder, source, result.gallery)
    title = f"{encoder.name} ({encoder.representation}) on {config.images}"
    command.console.print(report.label_free_table(title, result.measurements))
    if result.unreadable:
        command.console.print(f"{len(result.unreadable)} unreadable images were left out.")
    command.console.print(f"Results in {config.out}", highlight=False)


def plot(out: Path, encoder, source, gallery: dict[str, np.ndarray]) -> None:
    """Writes the three plots of a finished run."""
    report.plot_distances(out / "distances.png", records.read_table(out / "attacks.parquet"))
    report.plot_margins(out / "margins.png", records.read_table(out / "pairs.parquet"))
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
