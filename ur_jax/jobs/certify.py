"""Certificates of one encoder on many images, as a job that can be killed at any moment.

    python experiments/certify.py --encoder demo --images demo --method center --out runs/center
    python experiments/certify.py --encoder demo --images folder:photos --method randomized \\
        --probe runs/noisy_probe --out runs/randomized

Center smoothing, geometric_median and mean bound how far a smoothed representation moves, cosine
the direction that it keeps, neighbour how long its nearest direction stays; randomized smoothing
certifies the class of a probe. `--probe nearest` needs no labels: the classes are the images
themselves, and a noisy image counts for the one whose clean representation is nearest (l2). What is
certified then is that the smoothed encoder still tells an image from all others. `--method` takes
every name of `certify.CERTIFICATES`, also those of a `--plugin`.

Writes to --out: `certificates.parquet` (one row per image: the certificate and the raw counts it
follows from), `times.parquet` (seconds per image: the only file that differs between runs),
`summary.json` (with 95 % intervals) and the curves as `curves.png`. Finished images are written
every few seconds and skipped when the same command is started again; the table is the same, byte
for byte, since the noise of an image is keyed by its index. On several hosts start the same command
on each: images are divided over the hosts, the samples of an image over each host's devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from ur_jax import devices, metrics, runs
from ur_jax.certify.denoised import denoised
from ur_jax.certify.joint import MOVING, Directions, directions_of, smoothed
from ur_jax.certify.registry import CERTIFICATES, CertificateKind, kind_of
from ur_jax.checks import check_whole
from ur_jax.data import ImageBatch, evenly_spaced
from ur_jax.data.labels import check_labelled, labels_of, match_probe
from ur_jax.devices.memory import fit_batch_size
from ur_jax.encoders import checkpoints, factories
from ur_jax.encoders.base import Encoder
from ur_jax.errors import NotFoundError, UserError
from ur_jax.jobs import certify_attacked, certify_minutes, parts
from ur_jax.jobs.base import Job, ProbeLike, Session, register
from ur_jax.jobs.certify_parts import Images, Labels, Meter, finished, keep
from ur_jax.jobs.minutes import check_alone, check_minutes
from ur_jax.jobs.progress import counted
from ur_jax.probes.checkpoint import identified, load_probe
from ur_jax.probes.classifier import Classifier, nearest_image_classifier
from ur_jax.registry import import_object
from ur_jax.runs import Run
from ur_jax.runs.summary import Summary
from ur_jax.types import Curve, Values

BANK_BATCH = 64
"""Images per batch of a shared bank, over all devices."""

_NEAREST = "nearest"


@register("certify")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Certify(Job):
    """Certificates by noise, of an encoder or of a probe on it."""

    method: str | None = None
    """Which certificate, by its name in `certify.CERTIFICATES`; that of `config`, or center."""
    num_images: int = 200
    """Evenly spaced subset of the images."""
    minutes: float | None = None
    """Instead of num_images: speed is measured, and as many images are certified as fit."""
    seed: int = 0
    """Of the noise and of the distance distribution."""
    probe: ProbeLike | None = None
    """Of randomized and neighbour: checkpoint directory of a linear probe, class embeddings of a
    text encoder (classes.npy, with names in classes.json), or nearest (the default of neighbour),
    for which the images themselves are the classes."""
    class_map: tuple[str, ...] = ()
    """THEIRS=OURS each: classes of the images whose names differ from the probe's."""
    batch_size: int | None = None
    """Samples per device and forward pass; by default from the device's memory."""
    denoiser: str | None = None
    """A function that makes one, file.py:make or package.module:make: images pass through it before
    the encoder, and it is part of what is certified."""
    attacked: int = 0
    """Of geometric_median, mean and cosine: so many of the images are attacked too, and what was
    certified is told over what the attack finds."""
    num_distribution: int = 100_000
    """Of certificates of representations: clean images, at most, of the distance distribution F."""
    config: tyro.conf.Suppress[Any] = None
    """The settings of the certificate; by default those of its first preset."""

    @classmethod
    def command(cls) -> type[Certify]:
        """With a group of flags for the settings of each certificate."""
        return _command(tuple(CERTIFICATES.items()))

    def __post_init__(self):
        super().__post_init__()
        if self.minutes is not None:
            check_minutes(self.minutes)

    def settled(self, begun: Mapping[str, Any], mesh: Mesh) -> Self:
        """With as many images as fit into `minutes`, or as the run began with."""
        if self.minutes is None:
            return self
        check_alone(self.minutes, self.num_images, {each["num_images"] for each in _SIZES.values()})
        is_begun = begun.get("minutes") == self.minutes
        num_images = begun["num_images"] if is_begun else certify_minutes.fitting(self, mesh)
        return dataclasses.replace(self, num_images=num_images)

    @property
    def certificate(self) -> str:
        """Name of the certificate."""
        return self.method or ("center" if self.config is None else kind_of(self.config))

    @property
    def smoothing(self) -> Any:
        """Settings of the certificate."""
        if self.config is not None:
            return self.config
        group = getattr(self, _field(self.certificate), None)  # of a command line
        return group if isinstance(group, self._kind.settings) else self._kind.preset()

    @property
    def settings(self) -> dict[str, Any]:
        found = {
            "method": self.certificate,
            "num_images": self.num_images,
            "seed": self.seed,
            "settings": self.smoothing,
        }
        if self._kind.relative is not None:
            found["num_distribution"] = self.num_distribution
        if self.attacked:
            found["attacked"] = self.attacked
        if self.minutes is not None:
            found["minutes"] = float(self.minutes)
        if self._takes_probe:
            found["probe"] = _NEAREST if self._probe == _NEAREST else "trained"
            found |= {"class_map": list(self.class_map)} if self.class_map else {}
        return found

    @property
    def requires(self) -> dict[str, str]:
        return identified(self.probe) if isinstance(self.probe, Classifier) else {}

    @property
    def samples(self) -> int:
        num_images = min(self.num_images, len(self.source()))
        return num_images * self._kind.num_samples(self.smoothing)

    def opened(self) -> Self:
        """With its probe read too, if that is there: a benchmark plans before it is."""
        job = super().opened()
        if job.denoiser is not None:
            place, arguments = factories.split_arguments(job.denoiser)
            encoder = denoised(job.model, import_object(place)(**arguments))
            job = dataclasses.replace(job, encoder=encoder, denoiser=None)
        if not job._takes_probe or not isinstance(job.probe, str) or job.probe == _NEAREST:
            return job
        if not checkpoints.is_saved(job.probe):
            return job
        sigma = getattr(job.smoothing, "sigma", None)
        return dataclasses.replace(job, probe=load_probe(job.probe, job.model, sigma=sigma))

    def check(self, mesh: Mesh) -> None:
        if type(self.smoothing) is not self._kind.settings:
            raise UserError(
                f"Expected {self._kind.settings.__name__} for the certificate "
                f"{self.certificate!r}, got {type(self.smoothing).__name__}."
            )
        check_whole(self, "num_images")
        check_whole(self, "num_distribution", least=2)
        check_whole(self, "seed", "attacked", least=0)
        if self.attacked and self.certificate not in MOVING:
            raise UserError(
                f"Expected --method {', '.join(MOVING)} with --attacked, got {self.certificate!r}."
            )
        check_whole(self, "batch_size", optional=True)
        indices = evenly_spaced(len(self.source()), self.num_images)
        if self._takes_probe:
            self._check_probe(indices)
        elif self.probe is not None:
            raise UserError(
                f"Expected no probe for the certificate {self.certificate!r}, which is one of the "
                f"encoder itself; got {self.probe if isinstance(self.probe, str) else 'one'}."
            )

    def _check_probe(self, indices: np.ndarray) -> None:
        """Raises UserError for a probe that is not there, or labels that it cannot have."""
        if self._probe is None:
            raise UserError(
                f"Expected --probe with --method {self.certificate}: a checkpoint directory of a "
                "linear probe, or nearest, which needs no labels."
            )
        if self._probe == _NEAREST:
            if len(indices) < 2 or self.class_map:
                raise UserError(
                    "Expected at least 2 images and no class map with --probe nearest, whose "
                    f"classes are the images; got {len(indices)} and {list(self.class_map)}."
                )
        elif isinstance(self.probe, str):
            raise NotFoundError(f"There is no probe at {self.probe}; check the path, or train one.")
        elif self.source().class_names:
            self._classes()
            check_labelled(self.source(), indices)

    def compute(self, session: Session) -> None:
        if self._kind.relative is not None:  # first: it refuses an encoder that has collapsed
            self._clean_of_distribution(session)
        model, labels = self._smoothed(session)
        size = self.batch_size or self._fitting_batch_size(session, model)
        run, host = session.run, session.host
        rows = finished(run)  # of all hosts: there may have been another number of them
        mine = self._indices[host :: session.num_hosts]
        done = np.isin(mine, rows["index"] if rows else ())
        certified = np.isin(mine, rows["index"][~rows["abstained"]] if rows else ())
        images = Images(self.source(), mine[~done], self.model, labels)
        with counted(session.progress, "certificates", len(mine)) as update:
            meter = Meter(len(mine), int(done.sum()), int(certified.sum()), update)
            certificates = self._kind.certify(
                model,
                iter(images),
                jax.random.key(self.seed),
                config=self.smoothing,
                indices=images.taken(),
                mesh=session.mesh,
                batch_size=size,
                on_progress=meter.sampled,
            )
            keep(run, host, certificates, images, meter, seed=self.seed)
            meter.show()
        if self.attacked:
            certify_attacked.attack(
                session, self.model, self.source(), self._indices[: self.attacked],
                method=self.certificate, config=self.smoothing, seed=self.seed, batch_size=size,
            )  # fmt: skip
        if images.unreadable:
            pairs = np.array(sorted(images.unreadable.items()), np.str_)
            run.write_part(f"unreadable-{host}", 0, {"unreadable": pairs})

    def merge(self, session: Session) -> Summary:
        run = session.run
        rows = finished(run)
        if not rows:
            raise UserError(f"None of the {len(self._indices)} images could be read; see above.")
        order = np.argsort(rows["index"])
        columns = {name: values[order] for name, values in rows.items()}
        times = {"index": columns["index"], "seconds": columns.pop("seconds")}
        runs.write_table(run.path / "times.parquet", times)
        if self._kind.relative is not None:
            clean = self._clean_of_distribution(session)
            distribution = metrics.distance_distribution(
                jnp.asarray(clean["clean"]),
                jax.random.key(self.seed),
                divergence=self.smoothing.divergence,
            )
            columns |= self._kind.relative(columns, distribution)
        lists = {name: list(values) for name, values in columns.items()}  # some hold rows (N,K)
        runs.write_table(run.path / "certificates.parquet", lists)
        rows = list(self._kind.rows(columns, self.smoothing))
        return self.summary(
            [*runs.of_asked(rows, len(self._indices)), *self._over_found(run, columns)],
            self._unreadable(run, columns["index"]),
            samples=int(columns["num_drawn"].sum()),
            images=len(columns["index"]),
        )

    def _over_found(self, run: Run, columns: Mapping[str, np.ndarray]) -> Iterator[runs.Row]:
        """What was certified over what an attack found, of the images that were attacked."""
        if self.attacked:
            yield from certify_attacked.over_found(
                run, self._indices[: self.attacked], columns, method=self.certificate,
                config=self.smoothing,
            )  # fmt: skip

    def draw(self, session: Session) -> None:
        from ur_jax.report import canvas, figures  # need matplotlib, of the extra "report"

        name, drawn = self.model.name, {}
        columns = runs.read_table(session.run.path / "certificates.parquet")
        for curve in self._kind.curves(columns):
            drawn.setdefault(curve.figure, {})[curve.panel] = {name: curve}
        for number, panels in enumerate(drawn.values(), start=1):
            file = "curves.png" if number == 1 else f"curves-{number}.png"
            canvas.save_png(figures.draw(panels, [name]), session.run.path / file)

    @classmethod
    def curves(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Curve]:
        kind = CERTIFICATES.get(summary.identity.get("method", ""))
        if kind is not None:
            yield from kind.curves(runs.read_table(folder / "certificates.parquet"))

    @classmethod
    def values(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Values]:
        kind = CERTIFICATES.get(summary.identity.get("method", ""))
        if kind is not None:
            table = runs.read_table(folder / "certificates.parquet")
            yield from kind.values(table, summary.rows)

    @classmethod
    def remarks(cls, summary: Summary) -> Iterator[str]:
        yield from super().remarks(summary)
        samples, images = summary.details["samples"], summary.details["images"]
        yield f"{samples:,} samples, {samples / images:,.0f} per image."
        kind = CERTIFICATES.get(summary.identity.get("method", ""))
        if kind is not None and kind.said:
            yield kind.said

    @property
    def _kind(self) -> CertificateKind:
        """The certificate."""
        return CERTIFICATES[self.certificate]

    @property
    def _takes_probe(self) -> bool:
        """Whether a classifier is certified, or which direction is nearest."""
        return self._kind.smooths != "encoder"

    @property
    def _probe(self) -> ProbeLike | None:
        """The probe; the images themselves where directions need none."""
        directions = self._kind.smooths == "directions" and self.probe is None
        return _NEAREST if directions else self.probe

    @functools.cached_property
    def _indices(self) -> np.ndarray:
        """Positions of the images to certify."""
        return evenly_spaced(len(self.source()), self.num_images)

    def _classes(self) -> np.ndarray:
        """The probe's class of each of the images' classes."""
        assert isinstance(self.probe, Classifier), self.probe
        names, number = self.probe.class_names, self.probe.bias.shape[0]
        return match_probe(self.source(), names, number, self.class_map)

    def _smoothed(self, session: Session) -> tuple[Encoder | Classifier | Directions, Labels]:
        """What is smoothed, and the labels of a batch, in its classes."""
        if not self._takes_probe:
            return self.model, lambda batch: batch.labels
        if isinstance(self.probe, Classifier):
            if self._kind.smooths == "directions":
                weights = np.asarray(self.probe.kernel).T
                return directions_of(self.model, weights), self._labels
            return self.probe, self._labels
        if self._kind.smooths == "directions":
            return self._own_directions(session)
        # Every host needs them all, on one device: the same bits on any number of them.
        alone = dataclasses.replace(_on_one_device(session), host=0, num_hosts=1)
        stage = parts.Stage("clean", "clean representations", (self._indices,), BANK_BATCH)
        clean = parts.clean_representations(alone, self.model, self.source(), stage)
        own = {int(index): label for label, index in enumerate(clean["index"])}
        classifier = nearest_image_classifier(self.model, clean["clean"])
        return classifier, lambda batch: np.array([own.get(int(i), -1) for i in batch.indices])

    def _own_directions(self, session: Session) -> tuple[Directions, Labels]:
        """The smoothed encoder's directions of all images, which are to be told apart."""
        config = self.smoothing
        images = Images(self.source(), self._indices, self.model, lambda batch: batch.labels)
        found = smoothed(
            self.model, images, jax.random.key(self.seed), method=self.certificate, m=config.bank,
            config=config, indices=images.taken(), mesh=session.mesh,
            batch_size=self.batch_size or self._fitting_batch_size(session, self.model),
        )  # fmt: skip
        own = {index: label for label, index in enumerate(images.described)}
        directions = directions_of(self.model, found)
        return directions, lambda batch: np.array([own.get(int(i), -1) for i in batch.indices])

    def _labels(self, batch: ImageBatch) -> np.ndarray:
        """Labels of a batch in the probe's classes; -1 of images that have none at all."""
        if not self.source().class_names:
            return np.full(len(batch.labels), -1)
        return self._classes()[labels_of(self.source(), batch.labels, batch.mask, batch.names)]

    def _clean_of_distribution(self, session: Session) -> dict[str, np.ndarray]:
        """Clean representations that the distance distribution F is of."""
        source = self.source()
        num_images = min(len(source), self.num_distribution)
        banked = parts.with_bank(session, self.model, source, num_images, BANK_BATCH)
        name = "distribution" if session.bank is None else "clean"
        banked = _on_one_device(session) if session.bank is None else banked
        indices = (evenly_spaced(len(source), num_images),)
        stage = parts.Stage(name, "clean representations", indices, BANK_BATCH)
        return parts.clean_representations(banked, self.model, source, stage)

    def _fitting_batch_size(
        self, session: Session, model: Encoder | Classifier | Directions
    ) -> int:
        """What fits the device's memory; what the run began with, if it did."""
        run, stage = session.run, f"batch_size-{session.host}"
        if not run.num_parts(stage):
            size = fit_batch_size(lambda m, x: m(x), model, (*self.model.input_size, 3))
            run.write_part(stage, 0, {"batch_size": [size]})
        return int(run.read_parts(stage)["batch_size"][0])

    def _unreadable(self, run: Run, readable: np.ndarray) -> dict[str, str]:
        """{name: reason} of the images without a certificate."""
        folder = run.path / "parts"
        stages = sorted(path.name for path in folder.glob("unreadable-*"))
        pairs = [tuple(row) for stage in stages for row in run.read_parts(stage)["unreadable"]]
        reasons = {str(name): str(reason) for name, reason in pairs}
        names = [self.source().name(int(i)) for i in np.setdiff1d(self._indices, readable)]
        return {name: reasons.get(name, "") for name in names}


def _on_one_device(session: Session) -> Session:
    """The session with one device: the same bits on any number of them."""
    return dataclasses.replace(session, mesh=devices.data_mesh(jax.local_devices()[:1]))


def _field(name: str) -> str:
    """The field of a certificate's settings on the command line."""
    return name.replace("-", "_")


@functools.cache
def _command(kinds: tuple[tuple[str, CertificateKind], ...]) -> type[Certify]:
    """The job with a field for the settings of each certificate, and its presets."""
    for name, _ in kinds:
        if not _field(name).isidentifier() or hasattr(Certify, _field(name)):
            raise UserError(
                f"Expected another name for the certificate {name!r}: its settings become flags "
                f"--{name}.NAME, and there are others like them."
            )
    names = tuple(name for name, _ in kinds)
    choice = Annotated[Literal[names], tyro.conf.arg(help="Which certificate.")]
    groups = [(_field(n), k.settings, dataclasses.field(default=k.preset())) for n, k in kinds]
    job = dataclasses.make_dataclass(
        "Certify", [("method", choice, dataclasses.field(default=names[0])), *groups],
        bases=(Certify,), frozen=True, kw_only=True,
        namespace={"__doc__": Certify.__doc__, "__module__": __name__},
    )  # fmt: skip
    job.presets = {
        preset: job(**sizes, **{_field(name): kind.preset(preset) for name, kind in kinds})
        for preset, sizes in _SIZES.items()
    }
    return job


_SIZES: dict[str, dict[str, int]] = {
    "adaptive": {"num_images": 200},
    "quick": {"num_images": 16, "num_distribution": 512},
    "paper": {"num_images": 200},
}
Certify.presets = Certify.command().presets
