"""The benchmark's matrix: its settings, and the jobs of every encoder as stages of a plan.

A stage is added by one function that gives jobs, see `STAGES`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ur_jax import data, devices
from ur_jax.certify import CERTIFICATES, CenterConfig, RandomizedConfig
from ur_jax.data import CORRUPTIONS, ImageSource, ViewConfig
from ur_jax.encoders import factories, loading
from ur_jax.encoders.base import Encoder
from ur_jax.encoders.outputs import with_representation
from ur_jax.errors import UserError
from ur_jax.jobs.base import Job, Representation
from ur_jax.jobs.certify import Certify
from ur_jax.jobs.impersonate import Impersonate, ImpersonationConfig
from ur_jax.jobs.label_free import EvaluationConfig, LabelFree
from ur_jax.jobs.probe import Probe
from ur_jax.jobs.stage_settings import CertificateSettings, ProbeSettings
from ur_jax.probes.linear import ProbeConfig
from ur_jax.registry import Registry
from ur_jax.runs.plan import Plan, Stage


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoders, which images, where to; the stages' own flags follow."""

    workdir: Path = Path("runs/benchmark")
    """Working directory; what is finished there is skipped. On several hosts, one that all see. May
    be of a bucket: gs://BUCKET/FOLDER (pip install "ur_jax[gcs]")."""
    preset: str = "paper"
    """paper (its protocol), quick or cifar (minutes per encoder on two cores)."""
    encoders: tuple[str, ...] = ()
    """PLACE or NAME=PLACE each: checkpoint directories, published files (as mocov2=FILE), functions
    that make one (as mine=file.py:make), or encoders that ship: demo. By default, those that
    ship."""
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
    """Compile every hot function for devices that need not be here, and stop: h100:8 (GPUs; also
    a100, h200, b200, l4), h100:8x4 (four hosts of 8), or a TPU topology such as v5e:16x16."""
    representation: Representation = "paper"
    """paper, backbone, projection or another output of the network; probes read `features`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    image_cache: Path | None = None
    """Folder of decoded images that all stages and encoders share: an image is decoded once for an
    input size and preparation. It changes no number and may be deleted."""
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
    protocol=EvaluationConfig(
        num_images=64, read_at=(5, 10, 20), num_distribution=None, strong_steps=10
    ),
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
        # Chosen for the demo encoder on held-out training images, see experiments/README.md.
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
      place: what `load_encoder` takes.
      name: which encoder a published file holds; None for anything else.
    """

    label: str
    place: str
    name: str | None

    @classmethod
    def of(cls, text: str) -> EncoderEntry:
        """Of PLACE or NAME=PLACE.

        Raises:
          UserError: for a label that cannot be the name of a folder.
        """
        label, is_named, place = text.partition("=")
        if not is_named or ":" in label or os.path.exists(text):  # the "=" is of the place
            label, place = "", text
        label = label or _label_of(place)
        if not re.fullmatch(r"[\w+@][\w.+@-]*", label):
            raise UserError(
                f"Expected a name of letters, digits and . _ + @ - for the encoder {place}, got "
                f"{label!r}: its results go to a folder of that name. Give one, as in mine={place}."
            )
        return cls(label, place, label if os.path.isfile(place) else None)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a stage's function is given: the settings, one encoder, the images by their use.

    Attributes:
      config: of the benchmark.
      entry: the encoder.
      network: its own name; "" where it cannot be loaded.
      sources: {"images", "test", "train", "pets": images, or None where none are given}.
    """

    config: Config
    entry: EncoderEntry
    network: str
    sources: Mapping[str, ImageSource | None]

    @property
    def folder(self) -> Path:
        """Of the encoder's stages."""
        return self.config.workdir / self.entry.label

    @property
    def shared(self) -> dict[str, Any]:
        """The settings of jobs that name the encoder."""
        return {
            "encoder": self.entry.place,
            "name": self.entry.name,
            "dtype": self.config.dtype,
        }

    def source(self, use: str) -> Any:
        """The images of a use, or those of the label-free stages to plan with."""
        return self.sources[use] or self.sources["images"]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A job of the matrix.

    Attributes:
      stage: name of its folder.
      job: with the encoder named and the images listed.
      uses: of `Cell.sources`; the stage cannot run without one of them.
      requires: names of the encoder's stages that must be finished before.
    """

    stage: str
    job: Job
    uses: tuple[str, ...] = ("images",)
    requires: tuple[str, ...] = ()


STAGES: Registry[Callable[[Cell], Iterator[Planned]]] = Registry(
    "benchmark stage", "ur_jax.benchmark_stages"
)
"""What gives the jobs of one encoder, in the order in which they run."""


def make_plan(config: Config) -> Plan:
    """The plan of a configuration: all stages of all encoders.

    Raises:
      UserError: for two encoders of one label, or images that cannot be opened.
    """
    data.check_workers(config.num_workers)
    specs = image_specs(config)
    opened = {spec: data.open_images(spec) for spec in dict.fromkeys(specs.values()) if spec}
    sources = {use: opened.get(spec or "") for use, spec in specs.items()}
    stages: list[Stage] = []
    for text in config.encoders or loading.packaged():
        stages += encoder_stages(config, EncoderEntry.of(text), sources)
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


def encoder_stages(
    config: Config, entry: EncoderEntry, sources: Mapping[str, ImageSource | None]
) -> Iterator[Stage]:
    """All stages of one encoder, in order; it is loaded once, to say early what cannot be."""
    encoder, missing = None, ""
    try:
        encoder = loading.load_encoder(entry.place, entry.name, config.representation, config.dtype)
    except UserError as error:
        missing = f"{type(error).__name__}: {error}"
    flops = None if encoder is None else flops_per_image(encoder)
    cell = Cell(config, entry, "" if encoder is None else encoder.name, sources)
    for give in STAGES.values():
        for planned in give(cell):
            yield _stage(cell, planned, encoder, missing, flops)


def flops_per_image(encoder: Encoder) -> float | None:
    """Floating-point operations of a representation, without compiling."""
    image = jax.ShapeDtypeStruct((1, *encoder.input_size, 3), jnp.float32)
    cost = jax.jit(lambda encoder, image: encoder(image)).lower(encoder, image).cost_analysis()
    return (cost or {}).get("flops")


def _stage(
    cell: Cell, planned: Planned, encoder: Encoder | None, missing: str, flops: float | None
) -> Stage:
    """A stage of the plan."""
    left_out = ""
    if any(cell.sources[use] is None for use in planned.uses):
        left_out = "It needs a probe; give --train-images."
    job, folder = planned.job, cell.folder
    known = job
    if encoder is not None:
        own = with_representation(encoder, job.representation)
        known = dataclasses.replace(job, encoder=own)
    if not (missing or left_out or planned.requires):
        try:
            known.check(devices.data_mesh())
        except UserError as error:
            missing = str(error)
    is_planned = not (missing or left_out)
    return Stage(
        cell.entry.label,
        planned.stage,
        {} if encoder is None else known.request,
        lambda: job.run(
            folder / planned.stage,
            bank=folder / "clean",
            image_cache=cell.config.image_cache,
            num_workers=cell.config.num_workers,
        ),
        requires=planned.requires,
        samples=known.samples if is_planned else 0,
        work=known.samples * flops if is_planned and flops is not None else None,
        missing=missing,
        left_out=left_out,
    )


@STAGES.register("label-free")
def _label_free(cell: Cell) -> Iterator[Planned]:
    """Attacks and distances."""
    config, protocol = cell.config, cell.config.protocol

    def job(*stages: Any, **changes: Any) -> LabelFree:
        return LabelFree(
            **cell.shared,
            images=cell.source("images"),
            representation=config.representation,
            stages=stages,
            protocol=dataclasses.replace(protocol, **changes),
        )

    yield Planned("distances", job("distances"))
    for eps in protocol.eps:
        yield Planned(f"attacks-{eps:g}", job("attacks", eps=(eps,)))
    yield Planned("overlap", job("overlap"))
    yield Planned("breakaway", job("breakaway"))
    for eps in protocol.strong_eps:
        yield Planned(f"strongest-{eps:g}", job("strongest", strong_eps=(eps,)))


@STAGES.register("probes")
def _probes(cell: Cell) -> Iterator[Planned]:
    """Linear probes of every kind."""
    settings = cell.config.probe
    training = settings.training
    if cell.network == "mae":
        training = dataclasses.replace(training, batch_norm=True)
    for kind, corruption in CORRUPTIONS.items():
        is_random = settings.augment or corruption.is_random
        job = Probe(
            **cell.shared,
            images=cell.source("train"),
            test_images=cell.source("test"),
            num_images=settings.num_images,
            num_test_images=settings.num_test_images,
            cached=settings.cached,
            num_draws=settings.num_draws if is_random else 1,
            views=ViewConfig(kind=kind, augment=settings.augment),
            training=training,
        )
        yield Planned(f"probe-{kind}", job, ("train", "test"))


@STAGES.register("certificates")
def _certificates(cell: Cell) -> Iterator[Planned]:
    """Certified divergence, and certified accuracy of the noisy probe."""
    config, settings = cell.config, cell.config.certificates
    total = len(cell.source("test"))
    number = min(settings.num_images, total)
    protocol = config.protocol
    divergence = Certify(
        **cell.shared,
        images=cell.source("test"),
        representation=config.representation,
        method="center",
        num_images=min(settings.num_center_images or number, total),
        num_distribution=min(protocol.num_distribution or total, protocol.num_clean or total),
        config=settings.center,
    )
    yield Planned("certified-divergence", divergence, ("test",))
    accuracy = Certify(
        **cell.shared,
        images=cell.source("test"),
        representation="features",
        method="randomized",
        num_images=number,
        probe=str(cell.folder / "probe-noisy" / "probe"),
        config=settings.randomized,
    )
    yield Planned("certified-accuracy", accuracy, ("test", "train"), ("probe-noisy",))


@STAGES.register("certificates-of-streams")
def _streams(cell: Cell) -> Iterator[Planned]:
    """Certificates of other smoothed encoders than the paper's, where they are asked for."""
    config, settings, protocol = cell.config, cell.config.certificates, cell.config.protocol
    total = len(cell.source("test"))
    for name in settings.streams:
        job = Certify(
            **cell.shared,
            images=cell.source("test"),
            representation=config.representation,
            method=name,
            num_images=min(settings.num_center_images or settings.num_images, total),
            num_distribution=min(protocol.num_distribution or total, protocol.num_clean or total),
            config=CERTIFICATES[name].preset(config.preset),
        )
        yield Planned(f"certified-{name.replace('_', '-')}", job, ("test",))


@STAGES.register("impersonation")
def _impersonation(cell: Cell) -> Iterator[Planned]:
    """Cats towards dogs and dogs towards cats."""
    config = cell.config
    job = Impersonate(
        **cell.shared,
        probe=str(cell.folder / "probe-standard" / "probe"),
        images=cell.source("pets"),
        representation=config.representation,
        first=config.first,
        second=config.second,
        first_range=config.first_range,
        second_range=config.second_range,
        attack=config.impersonation,
    )
    yield Planned("impersonation", job, ("pets", "train"), ("probe-standard",))


def _label_of(place: str) -> str:
    """The name of an encoder's folder from its place: a file, a folder, or the run it is of."""
    if factories.is_place(place) and not os.path.exists(place):
        module = factories.split_arguments(place)[0].rpartition(":")[0]
        return Path(module).stem if module.endswith(".py") else module.rpartition(".")[2]
    parts = [part for part in Path(place).parts if part != os.sep]
    return parts[-2] if len(parts) > 1 and parts[-1] == "encoder" else parts[-1]
