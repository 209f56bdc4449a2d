"""The benchmark's matrix: its settings and presets, and the stages of every encoder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certify
import evaluate
import impersonate
import jax
import jax.numpy as jnp
import probe

import ur_jax
from ur_jax import data
from ur_jax.certify import CenterConfig, RandomizedConfig
from ur_jax.encoders import loading
from ur_jax.jobs.impersonate import ImpersonationConfig
from ur_jax.jobs.label_free import EvaluationConfig
from ur_jax.probes.linear import ProbeConfig
from ur_jax.runs.plan import Plan, Stage

PROBE_KINDS = ("standard", "noisy", "low_pass")
_ATTACK_STEP = 3  # forward passes that a step costs, with its gradient


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How the probes are trained."""

    num_images: int | None = None
    """Evenly spaced subset of the training images; all by default."""
    num_test_images: int | None = None
    """Evenly spaced subset of the test images; all by default."""
    cached: bool = False
    """Encode the training images once and train on the features."""
    num_draws: int = 1
    """Of --probe.cached: draws of crops and noise of each image."""
    augment: bool = True
    """Train on random crops and flips."""
    training: ProbeConfig = ProbeConfig()


@dataclasses.dataclass(frozen=True)
class CertificateSettings:
    """How certificates are computed."""

    num_images: int = 200
    """Evenly spaced subset of the test images."""
    num_center_images: int | None = None
    """The same of center smoothing; --certificates.num-images by default."""
    center: CenterConfig = CenterConfig(bound="hoeffding")
    randomized: RandomizedConfig = RandomizedConfig()


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoders, which images, where to; the stages' own flags follow."""

    workdir: Path = Path("runs/benchmark")
    """Working directory; what is finished there is skipped. On several hosts, one that all see. May
    be of a bucket: gs://BUCKET/FOLDER (pip install "ur_jax[gcs]")."""
    preset: str = "paper"
    """paper (its protocol), quick or cifar (minutes per encoder on two cores)."""
    encoders: tuple[str, ...] = ()
    """PATH or NAME=PATH each: checkpoint directories, published files (as mocov2=FILE), or encoders
    that ship: demo. By default, those that ship."""
    images: str = "demo"
    """Image spec of the label-free stages: folder:PATH, tfds:NAME/SPLIT or demo."""
    test_images: str | None = None
    """Image spec of certificates and of the probes' tests; --images by default."""
    train_images: str | None = None
    """Image spec of the probes' training; without it, stages that need a probe are left out."""
    pet_images: str | None = None
    """Image spec of impersonation, with classes of cats and dogs; --test-images by default."""
    only: tuple[str, ...] = ()
    """ENCODER/STAGE each, with * for any: run only these."""
    dry_run: bool = False
    """Print the plan and stop."""
    compile_only: str | None = None
    """A TPU topology such as v5e:16x16: compile every hot function for it and stop."""
    representation: str = "paper"
    """paper, backbone, projection or another output of the network; probes read `features`."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    num_workers: int = 0
    """Processes that decode images; more than 0 pays on many cores."""
    protocol: EvaluationConfig = EvaluationConfig()
    probe: ProbeSettings = ProbeSettings()
    certificates: CertificateSettings = CertificateSettings()
    impersonation: ImpersonationConfig = ImpersonationConfig()
    first: tuple[str, ...] = ("cat",)
    """Classes of --pet-images in the first group of impersonation."""
    second: tuple[str, ...] = ("dog",)
    """Classes of the second group."""
    first_range: tuple[int, int] | None = (281, 293)
    """First and last of the probe's classes that count as the first group; by name if left out."""
    second_range: tuple[int, int] | None = (151, 274)
    """The same of the second group."""


_QUICK = Config(
    preset="quick",
    protocol=EvaluationConfig(num_images=64, read_at=(5, 10, 20), num_distribution=None),
    probe=ProbeSettings(num_images=2560, num_test_images=512, cached=True),
    certificates=CertificateSettings(
        num_images=16,
        center=CenterConfig(bound="union", n0=1000, n=10_000),
        randomized=RandomizedConfig(bound="union", n=10_000),
    ),
    impersonation=ImpersonationConfig(num_images=64, read_at=(3, 5, 10, 20)),
    first_range=None,
    second_range=None,
)
PRESETS = {
    "paper": Config(),
    "quick": _QUICK,
    "cifar": dataclasses.replace(
        _QUICK,
        preset="cifar",
        protocol=EvaluationConfig(
            num_images=64, read_at=(5, 10, 30, 50), num_clean=2000, num_distribution=None
        ),
        # Chosen for the demo encoder on held-out training images, see the README.
        probe=ProbeSettings(
            num_images=10_000,
            num_test_images=2000,
            cached=True,
            num_draws=2,
            augment=False,
            training=ProbeConfig(learning_rate=0.1, batch_norm=True),
        ),
        certificates=CertificateSettings(
            num_images=100,
            num_center_images=16,
            center=CenterConfig(bound="union", n0=1200, n=10_000),
            randomized=RandomizedConfig(n=1000),
        ),
        impersonation=ImpersonationConfig(num_images=64),
    ),
}


@dataclasses.dataclass(frozen=True)
class EncoderEntry:
    """An encoder of the plan.

    Attributes:
      label: name of its folder.
      path: what `load_encoder` takes.
      name: which encoder a published file holds; None for a checkpoint.
      missing: why it cannot be loaded; empty if it can.
      network: the encoder's own name.
      weights: hash of its weights.
      flops: floating-point operations of one image's representation.
    """

    label: str
    path: str
    name: str | None
    missing: str = ""
    network: str = ""
    weights: str = ""
    flops: float | None = None


def make_plan(config: Config) -> Plan:
    """The plan of a configuration: all stages of all encoders.

    Raises:
      ValueError: for two encoders of one label, or images that cannot be opened.
    """
    listings = {
        spec: data.open_images(spec) for spec in image_specs(config).values() if spec is not None
    }
    stages = []
    for entry in read_encoders(config):
        stages += encoder_stages(config, entry, listings)
    return Plan(config.workdir, stages)


def image_specs(config: Config) -> dict[str, str | None]:
    """{use: spec}; None where none is given."""
    test = config.test_images or config.images
    return {
        "images": config.images,
        "test": test,
        "train": config.train_images,
        "pets": config.pet_images or test,
    }


def read_encoders(config: Config) -> Iterator[EncoderEntry]:
    """Loads every encoder once, to say early what cannot be loaded."""
    for text in config.encoders or loading.packaged():
        label, path = label_of(text), text.rpartition("=")[2]
        name = label if os.path.isfile(path) else None
        entry = EncoderEntry(label, path, name)
        try:
            encoder = ur_jax.load_encoder(path, name, config.representation, config.dtype)
        except (ValueError, OSError, ImportError) as error:
            yield dataclasses.replace(entry, missing=f"{type(error).__name__}: {error}")
            continue
        yield dataclasses.replace(
            entry,
            network=encoder.name,
            weights=ur_jax.weights_hash(encoder),
            flops=flops_per_image(encoder),
        )


def label_of(text: str) -> str:
    """The name of an encoder's folder: as given, or from its path, or of the run it is from."""
    label, _, path = text.rpartition("=")
    parts = [part for part in Path(path).parts if part != os.sep]
    return label or (parts[-2] if len(parts) > 1 and parts[-1] == "encoder" else parts[-1])


def flops_per_image(encoder) -> float | None:
    """Floating-point operations of a representation, without compiling."""
    image = jax.ShapeDtypeStruct((1, *encoder.input_size, 3), jnp.float32)
    cost = jax.jit(lambda encoder, image: encoder(image)).lower(encoder, image).cost_analysis()
    return (cost or {}).get("flops")


def encoder_stages(
    config: Config, entry: EncoderEntry, listings: dict[str, data.ImageSource]
) -> Iterator[Stage]:
    """All stages of one encoder, in order."""
    specs, protocol = image_specs(config), config.protocol
    num_images = len(listings[specs["images"]])
    attacked = min(protocol.num_images, num_images)
    folder = config.workdir / entry.label
    shared = {
        "encoder": entry.path,
        "name": entry.name,
        "dtype": config.dtype,
    }

    def stage(name: str, script: Any, settings: Any, samples: int, uses: tuple[str, ...], **more):
        """A stage that calls `script.main` of its settings, with the folder filled in."""
        settings = dataclasses.replace(settings, out=folder / name)
        missing = entry.missing
        if not missing and any(specs[use] is None for use in uses):
            missing = "It needs a probe; give --train-images."
        plain = dataclasses.asdict(settings)
        for field in ("out", "clean", "encoder", "probe", "num_workers"):  # where, not what
            plain.pop(field, None)
        if script is evaluate:
            plain["protocol"] = settings.protocol.of_stages(settings.stages)
        if script is certify:
            del plain["center" if settings.method == "randomized" else "randomized"]
        plain |= {
            "script": script.__name__,
            "weights": entry.weights,
            "listings": [listings[specs[use]].listing_hash for use in uses if specs[use]],
        }
        return Stage(
            entry.label,
            name,
            plain,
            lambda: script.main(settings),
            samples=samples,
            work=None if entry.flops is None else samples * entry.flops,
            missing=missing,
            **more,
        )

    def label_free(name: str, stages: tuple[str, ...], samples: int, **changes):
        settings = evaluate.Config(
            **shared,
            images=specs["images"],
            representation=config.representation,
            num_workers=config.num_workers,
            stages=stages,
            clean=folder / "clean",
            protocol=dataclasses.replace(protocol, **changes),
        )
        return stage(name, evaluate, settings, samples, ("images",))

    bank = protocol.num_clean or num_images
    yield label_free("distances", ("distances",), bank)
    steps = _ATTACK_STEP * (max(protocol.read_at) + 1)
    for eps in protocol.eps:
        samples = attacked * (2 * steps + 1)
        yield label_free(f"attacks-{eps:g}", ("attacks",), samples, eps=(eps,))
    pairs = min(attacked, num_images // 2)
    samples = 2 * pairs * (_ATTACK_STEP * protocol.overlap_steps + 1)
    yield label_free("overlap", ("overlap",), samples)
    samples = attacked * (_ATTACK_STEP * protocol.breakaway_steps + 1)
    yield label_free("breakaway", ("breakaway",), samples)

    settings, certificates = config.probe, config.certificates
    training = settings.training
    if entry.network == "mae":
        training = dataclasses.replace(training, batch_norm=True)
    if config.train_images is not None:
        num_train = settings.num_images or len(listings[specs["train"]])
        passes = settings.num_draws if settings.cached else training.num_epochs
        num_test = settings.num_test_images or len(listings[specs["test"]])
        samples = num_train * passes + 2 * num_test
    for kind in PROBE_KINDS:
        is_random = settings.augment or kind == "noisy"
        probe_config = probe.Config(
            **shared,
            images=specs["train"] or "",
            test_images=specs["test"],
            out=folder,
            num_images=settings.num_images,
            num_test_images=settings.num_test_images,
            cached=settings.cached,
            num_draws=settings.num_draws if is_random else 1,
            num_workers=config.num_workers,
            views=data.ViewConfig(kind=kind, augment=settings.augment),
            training=training,
        )
        yield stage(
            f"probe-{kind}", probe, probe_config, samples if config.train_images else 0,
            ("train", "test"),
        )  # fmt: skip

    num_test = len(listings[specs["test"]])
    number = min(certificates.num_images, num_test)
    distribution = min(protocol.num_distribution or num_test, protocol.num_clean or num_test)
    certificate = certify.Config(
        **shared,
        images=specs["test"],
        num_images=number,
        representation=config.representation,
        num_distribution=distribution,
        clean=folder / "clean",
        center=certificates.center,
        randomized=certificates.randomized,
    )
    center, num_center = certificates.center, certificates.num_center_images or number
    samples = num_center * (2 * center.n0 + center.n)
    divergence = dataclasses.replace(certificate, num_images=min(num_center, num_test))
    yield stage("certified-divergence", certify, divergence, samples, ("test",))
    randomized = dataclasses.replace(
        certificate,
        method="randomized",
        representation="features",
        probe=str(folder / "probe-noisy" / "probe"),
    )
    samples = number * (certificates.randomized.n0 + certificates.randomized.n)
    yield stage(
        "certified-accuracy", certify, randomized, samples, ("test", "train"),
        requires=("probe-noisy",),
    )  # fmt: skip
    impersonation = impersonate.Config(
        **shared,
        probe=str(folder / "probe-standard" / "probe"),
        images=specs["pets"],
        first=config.first,
        second=config.second,
        first_range=config.first_range,
        second_range=config.second_range,
        representation=config.representation,
        num_workers=config.num_workers,
        attack=config.impersonation,
    )
    number = config.impersonation.num_images or len(listings[specs["pets"]]) // 2
    samples = 2 * number * (_ATTACK_STEP * max(config.impersonation.read_at) + 2)
    yield stage(
        "impersonation", impersonate, impersonation, samples, ("pets", "train"),
        requires=("probe-standard",),
    )  # fmt: skip
