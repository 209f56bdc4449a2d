"""The paper's headline at CIFAR scale: does adversarial training without labels give robustness?

    python experiments/reproduce_cifar.py --data cifar10 --workdir runs/cifar

From nothing but the images (--data holds train/CLASS/* and test/CLASS/*): fine-tunes encoder "demo"
by MoCo v2 with the untargeted, targeted and loss attack and by FARE (`ur-jax train`), then runs the
benchmark (`ur-jax benchmark --preset cifar`) on "demo" and all four: the label-free table, three
probes, certified accuracy and radius (noisy probe), certified divergence, impersonation of cats and
dogs. A killed run goes on where it stopped.

--preset full is the whole of it: five epochs of 45,000 images (the other 5,000 are held out, for
choices), LORE too, 500 certified images with adaptive tests of up to 100,000 samples at the radii
0.1, 0.25, 0.5 and 0.75, the certificates of the other smoothed encoders, 256 images impersonated in
each direction. It has not been run: it takes days on two cores. --preset quarter, of a
quarter of these images, a tenth of the samples and one smoothed encoder, has: two hours.

Writes WORKDIR/training/NAME/encoder, the benchmark's folders, RESULTS.csv, report.html, figures/
and the headline as table.md.

The copies of CIFAR-10 that this was run on are JPEG files: numbers do not compare with published
CIFAR-10 figures. Nothing was tuned on the test images.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from ur_jax import runs
from ur_jax.attacks import AttackConfig
from ur_jax.certify import CenterConfig, RandomizedConfig
from ur_jax.errors import NotFoundError, UserError
from ur_jax.jobs import benchmark
from ur_jax.jobs.progress import console
from ur_jax.jobs.recipes import recipe
from ur_jax.jobs.stage_settings import CertificateSettings
from ur_jax.jobs.train import Train
from ur_jax.training import FareConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """How much of everything."""

    data: Path = tyro.MISSING
    """Folder with train/ and test/, a sub-folder per class in each."""
    workdir: Path = tyro.MISSING
    """Folder of the results; a run that stopped there goes on."""
    preset: str = "small"
    """small (about an hour on two cores), quarter (two) or full (days)."""
    fine_tunings: tuple[str, ...] = ("untargeted", "targeted", "loss", "fare")
    """Attacks of MoCo v2, and fare, lore, simclip; lore@0.02 with another rho, and fare-noise with
    noise on its views, as of the last three."""
    num_train: int = 30_000
    """Evenly spaced training images of the fine-tuning."""
    num_epochs: int = 1
    batch_size: int = 128
    adversary: AttackConfig = AttackConfig(eps=0.05, step_size=0.02, num_steps=3)
    """The attack inside training."""
    noise: float = 0.25
    """Standard deviation of the noise of those that end in -noise: for smoothing."""
    benchmark: benchmark.Config = benchmark.PRESETS["cifar"]
    """What is measured afterwards; its images and encoders are filled in."""


_CIFAR = benchmark.PRESETS["cifar"]
_FULL = Config(
    preset="full",
    fine_tunings=("untargeted", "targeted", "loss", "fare", "lore"),
    num_train=45_000,
    num_epochs=5,
    benchmark=dataclasses.replace(
        _CIFAR,
        protocol=dataclasses.replace(_CIFAR.protocol, num_images=256, num_clean=10_000),
        probe=dataclasses.replace(_CIFAR.probe, num_images=50_000, num_test_images=10_000),
        certificates=CertificateSettings(
            num_images=500,
            num_center_images=100,
            center=CenterConfig(bound="union", n0=10_000, n=100_000),
            randomized=RandomizedConfig(
                n=100_000, bound="calibrated", radii=(0.0, 0.1, 0.25, 0.5, 0.75)
            ),
            streams=("geometric_median", "mean", "cosine"),
        ),
        impersonation=dataclasses.replace(_CIFAR.impersonation, num_images=256),
    ),
)
_CERTIFIED = _FULL.benchmark.certificates
PRESETS = {
    "small": Config(),
    "quarter": dataclasses.replace(
        _FULL,
        preset="quarter",
        num_train=11_250,
        benchmark=dataclasses.replace(
            _FULL.benchmark,
            protocol=dataclasses.replace(_CIFAR.protocol, num_images=64, num_clean=2_500),
            probe=_CIFAR.probe,
            certificates=CertificateSettings(
                num_images=125,
                num_center_images=25,
                center=dataclasses.replace(_CERTIFIED.center, n0=2_500, n=10_000),
                randomized=dataclasses.replace(_CERTIFIED.randomized, n=10_000),
            ),
        ),
    ),
    "full": _FULL,
}


def main(config: Config) -> int:
    """Trains what is not trained yet, measures what is not measured; returns the exit status."""
    for split in ("train", "test"):
        if not (config.data / split).is_dir():
            raise NotFoundError(f"Expected --data with a folder {split}/ in it, got {config.data}.")
    jobs = {name: training(config, name) for name in config.fine_tunings}  # or raises, at once
    for name, job in jobs.items():
        console.rule(f"training: {name}")
        job.run(place(config, name), image_cache=config.benchmark.image_cache)
    status = benchmark.main(measured(config))
    from ur_jax.report import collect, compare, terminal  # above the jobs, which they read

    numbers = collect.collect(config.workdir).numbers
    table = terminal.encoder_table(compare.headline(numbers), ("demo", *config.fine_tunings))
    with runs.atomic_path(config.workdir / "table.md") as temporary:
        temporary.write_text(terminal.as_markdown(table))
    console.print(f"The headline: {config.workdir / 'table.md'}", highlight=False)
    return status


def place(config: Config, name: str) -> Path:
    """Folder of one fine-tuning."""
    return config.workdir / "training" / name


def training(config: Config, name: str) -> Train:
    """The fine-tuning of one encoder: a method of its own, or MoCo v2 under an attack."""
    plain = name.removesuffix("-noise")
    begun = recipe(plain)
    if plain != name:
        if not isinstance(begun.method, FareConfig):  # MoCo's views are those of its papers
            raise UserError(f"Expected -noise after fare, lore or simclip alone, got {name!r}.")
        method = dataclasses.replace(begun.method, noise=config.noise)
        begun = dataclasses.replace(begun, method=method)
    return dataclasses.replace(
        begun,
        images=f"folder:{config.data / 'train'}",
        num_images=config.num_train,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        adversary=config.adversary,
    )


def measured(config: Config) -> benchmark.Config:
    """The benchmark of "demo" and all that was fine-tuned."""
    tuned = [f"{name}={place(config, name) / 'encoder'}" for name in config.fine_tunings]
    test, images = (f"folder:{config.data / split}" for split in ("test", "train"))
    return dataclasses.replace(
        config.benchmark,
        workdir=config.workdir,
        encoders=("demo", *tuned),
        images=test,
        train_images=images,
    )
