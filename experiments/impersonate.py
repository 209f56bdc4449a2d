"""Impersonation: do attacked cats pass for dogs, and dogs for cats? Attacked without labels.

    python experiments/impersonate.py --encoder demo --probe runs/standard/probe \\
        --images folder:cifar10/test --first cat --second dog --out runs/impersonate

Each image that the probe classifies correctly is attacked towards the representation of an image of
the other group (targeted U-PGD); it succeeds where the probe then puts it into that group. Groups
are classes by name, of the images (sub-folders, in any case) and of the probe; with --preset
imagenet the probe's groups are ImageNet's ranges, 281-293 for cats and 151-274 for dogs.

Writes to --out: `impersonations.parquet` (per image and step), `summary.json` (success by direction
and step, with 95 % intervals) and `impersonations.png`. A killed run resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import command
import jax
import jax.numpy as jnp
import tyro

import ur_jax
from ur_jax import data, devices, runs
from ur_jax.certify import Classifier
from ur_jax.devices import hosts
from ur_jax.encoders import checkpoints, loading
from ur_jax.jobs import impersonate as impersonation
from ur_jax.jobs import probe as probing
from ur_jax.jobs.impersonate import ImpersonationConfig
from ur_jax.report import collect as results
from ur_jax.report import plots as report


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoder, which probe, which images, where to; the attack's own flags follow."""

    encoder: str = tyro.MISSING
    """Checkpoint directory, published file (with --name), or an encoder that ships: demo."""
    probe: str = tyro.MISSING
    """Checkpoint directory of a linear probe on the same encoder."""
    images: str = tyro.MISSING
    """Image spec: folder:PATH with a sub-folder per class, or tfds:NAME/SPLIT."""
    out: Path = tyro.MISSING
    """Folder of the results; a run that stopped there goes on."""
    preset: str = "classes"
    """classes (the probe's classes by name) or imagenet (a probe of ImageNet's 1,000 classes)."""
    first: tuple[str, ...] = ("cat",)
    """Classes of the first group."""
    second: tuple[str, ...] = ("dog",)
    """Classes of the second group."""
    first_range: tuple[int, int] | None = None
    """First and last of the probe's classes that count as the first group; by name if left out."""
    second_range: tuple[int, int] | None = None
    """The same of the second group."""
    name: str | None = None
    """Which encoder a published file holds."""
    representation: str = "paper"
    """What is attacked: paper, backbone, projection or another output of the network."""
    probe_representation: str = "features"
    """What the probe reads."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    num_workers: int = 0
    """Processes that decode images; more than 0 pays on many cores."""
    attack: tyro.conf.OmitArgPrefixes[ImpersonationConfig] = ImpersonationConfig()


PRESETS = {
    "classes": Config(),
    "imagenet": Config(preset="imagenet", first_range=(281, 293), second_range=(151, 274)),
}


def main(config: Config) -> None:
    load = lambda output: ur_jax.load_encoder(config.encoder, config.name, output, config.dtype)
    encoder = load(config.representation)
    read = load(config.probe_representation).replace(params=encoder.params)  # in memory once
    trained, known = probing.restore_probe(config.probe, read)
    classifier = Classifier(read, jnp.asarray(trained["kernel"]), jnp.asarray(trained["bias"]))
    source = data.open_images(config.images)
    probe_classes = known.get("class_names", ())
    groups = tuple(
        impersonation.make_group(names, source.class_names, probe_classes, index_range)
        for names, index_range in (
            (config.first, config.first_range),
            (config.second, config.second_range),
        )
    )
    mesh = devices.data_mesh()
    impersonation.check_groups(groups, len(trained["bias"]))  # before the folder is claimed
    devices.check_divisible(config.attack.batch_size, mesh)
    described = {
        **loading.described(encoder),
        "probe": config.probe,
        "probe_sha256": checkpoints.tree_hash(trained),
        "probe_representation": read.representation,
        "images": config.images,
        "listing_hash": source.listing_hash,
        "groups": [group._asdict() for group in groups],
        "attack": config.attack,
    }
    run = runs.open_run(config.out, described)
    job = impersonation.Job(
        encoder, classifier, source, groups, run, config.attack,
        mesh=mesh, num_workers=config.num_workers, progress=command.progress,
        host=jax.process_index(), num_hosts=jax.process_count(),
    )  # fmt: skip
    successes, clean = job.measure()
    if not hosts.is_first():
        return
    runs.write_json(
        config.out / "summary.json",
        {
            **runs.provenance(),
            "config": described,
            "metrics": [
                results.row(
                    "impersonation_success",
                    s.estimate,
                    eps=config.attack.eps,
                    step=s.step,
                    images=s.direction,
                )  # fmt: skip
                for s in successes
            ],
            "clean_accuracy": {name: estimate._asdict() for name, estimate in clean.items()},
            "unreadable": job.unreadable(),
        },
    )
    shown = job.gallery()
    report.plot_impersonation(
        config.out / "impersonations.png",
        *(shown[name] for name in ("images", "targets", "attacked", "success")),
        config.attack.read_at,
    )
    title = f"impersonation of {config.encoder} ({encoder.representation}), eps {config.attack.eps}"
    command.console.print(report.success_table(title, successes))
    for name, (value, low, high, n) in clean.items():
        command.console.print(
            f"{name}: the probe classifies {value:.1%} of {n} clean images correctly "
            f"({low:.1%} to {high:.1%}); only those are attacked",
            highlight=False,
        )
    command.console.print(f"Results in {config.out}", highlight=False)


if __name__ == "__main__":
    command.run(main, Config, PRESETS)
