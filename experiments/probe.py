"""Trains a linear probe on an encoder and tests it: top-1 and top-5 accuracy.

    python experiments/probe.py --encoder demo --images folder:cifar10/train \\
        --test-images folder:cifar10/test --kind noisy --cached --out runs/noisy

Kinds: standard, noisy (Gaussian noise on the images, sigma 0.25) and low_pass (frequencies inside a
disc). The probe reads the representation `features`. Without --cached it trains as the paper does,
on fresh crops and noise in every epoch; with --cached on features encoded once, in a small part of
the time (see --num-draws).

Writes to --out: `probe/` (a checkpoint that `certify.py --method randomized --representation
features --probe` and `impersonate.py` take), `predictions.parquet` (per test image, of the probe's
kind and clean) and `summary.json`. A killed run resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import command
import jax
import tyro

import ur_jax
from ur_jax import data, devices, runs
from ur_jax.data import ViewConfig
from ur_jax.devices import hosts
from ur_jax.encoders import checkpoints, loading
from ur_jax.jobs import probe as probing
from ur_jax.probes.linear import ProbeConfig
from ur_jax.report import collect as results
from ur_jax.report import plots as report


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoder, which labelled images, where to; the training's own flags follow."""

    encoder: str
    """Checkpoint directory, published file (with --name), or an encoder that ships: demo."""
    images: str
    """Image spec of the training images, with labels."""
    test_images: str
    """Image spec of the test images, with labels."""
    out: Path
    """Folder of the results; a run that stopped there goes on."""
    num_images: int | None = None
    """Evenly spaced subset of --images; all by default."""
    num_test_images: int | None = None
    """Evenly spaced subset of --test-images; all by default."""
    cached: bool = False
    """Encode the training images once and train on the features."""
    num_draws: int = 1
    """Of --cached: draws of crops and noise of each image that the epochs take in turn."""
    seed: int = 0
    name: str | None = None
    """Which encoder a published file holds."""
    representation: str = "features"
    """features (what the paper's probes read), paper, backbone, projection or another output."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    num_workers: int = 0
    """Processes that decode images; more than 0 pays on many cores."""
    views: tyro.conf.OmitArgPrefixes[ViewConfig] = ViewConfig()
    training: tyro.conf.OmitArgPrefixes[ProbeConfig] = ProbeConfig()


def main(config: Config) -> None:
    encoder = ur_jax.load_encoder(config.encoder, config.name, config.representation, config.dtype)
    train_source, test_source = (data.open_images(s) for s in (config.images, config.test_images))
    train_indices, test_indices = (
        data.evenly_spaced(len(source), number or len(source))
        for source, number in (
            (train_source, config.num_images),
            (test_source, config.num_test_images),
        )
    )
    mesh = devices.data_mesh()
    devices.check_divisible(config.training.batch_size, mesh)  # before the folder is claimed
    for source in (train_source, test_source):
        probing.check_classes(source)
    described = {
        **loading.described(encoder),
        "images": config.images,
        "listing_hash": train_source.listing_hash,
        "num_images": len(train_indices),
        "test_images": config.test_images,
        "test_listing_hash": test_source.listing_hash,
        "num_test_images": len(test_indices),
        "num_draws": config.num_draws if config.cached else None,
        "seed": config.seed,
        "views": config.views,
        "training": config.training,
    }
    run = runs.open_run(config.out, described)
    job = probing.Job(
        encoder, train_source, train_indices, run, config.training, config.views,
        num_draws=config.num_draws if config.cached else None, seed=config.seed,
        mesh=mesh, num_workers=config.num_workers, progress=command.progress,
        host=jax.process_index(), num_hosts=jax.process_count(),
    )  # fmt: skip
    path = config.out / "probe"
    if checkpoints.is_saved(path):
        trained, known = probing.restore_probe(path, encoder)
        history = known["history"]
    else:
        trained, history = job.train()
        known = {
            "kind": config.views.kind,
            "class_names": train_source.class_names,
            "training": json.loads((config.out / "config.json").read_text()),
            "history": history,
            "trained_with": runs.provenance(),
        }
        probing.save_probe(path, trained, encoder, known)
    accuracies = job.test(trained, test_source, test_indices)
    if not hosts.is_first():
        return
    runs.write_json(
        config.out / "summary.json",
        {
            **runs.provenance(),
            "config": described,
            "metrics": [results.row(a.metric, a.estimate, images=a.images) for a in accuracies],
            "history": history,
            "unreadable": job.unreadable(),
        },
    )
    title = f"{config.views.kind} probe of {config.encoder} ({encoder.representation})"
    shown = {f"{a.metric} on {a.images} images": a.estimate for a in accuracies}
    command.console.print(report.certificate_table(title, shown))
    last = history[-1]
    command.console.print(
        f"last epoch: loss {last['loss']:.3f}, training accuracy {last['accuracy']:.2%}. "
        f"Results in {config.out}",
        highlight=False,
    )


if __name__ == "__main__":
    command.run(main, Config)
