"""Certificates of one encoder on many images, as a job that can be killed at any moment.

    python experiments/certify.py --encoder demo --images demo --method center --out runs/center
    python experiments/certify.py --encoder demo --images folder:photos --method randomized \\
        --probe runs/noisy_probe --out runs/randomized

Center smoothing bounds how far the smoothed representation moves; randomized smoothing certifies
the class of a probe. `--probe nearest` needs no labels: the classes are the images themselves, and
a noisy image counts for the one whose clean representation is nearest (l2). What is certified then
is that the smoothed encoder still tells an image from all others. `--method` takes every name of
`certify.CERTIFICATES`, also those of a `--plugin`.

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
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from ur_jax import devices, metrics, runs
from ur_jax.certify.registry import CERTIFICATES, Certificate, CertificateKind, kind_of
from ur_jax.data import ImageBatch, evenly_spaced, image_batches
from ur_jax.data.labels import check_labelled, labels_of, match_probe
from ur_jax.devices.memory import fit_batch_size
from ur_jax.encoders import checkpoints
from ur_jax.encoders.base import Encoder
from ur_jax.errors import NotFoundError, UserError
from ur_jax.jobs import parts
from ur_jax.jobs.base import Job, ProbeLike, Session, register
from ur_jax.jobs.progress import counted
from ur_jax.probes.checkpoint import identified, load_probe
from ur_jax.probes.classifier import Classifier, nearest_image_classifier
from ur_jax.runs import Run
from ur_jax.runs.summary import Summary
from ur_jax.types import Curve

BANK_BATCH = 64
"""Images per batch of a shared bank, over all devices."""

_STAGE = "certificates"
_FLUSH_SECONDS = 5.0
_LOAD_BATCH = 8
_NEAREST = "nearest"

Labels = Callable[[ImageBatch], np.ndarray]


@register("certify")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Certify(Job):
    """Certificates by noise, of an encoder or of a probe on it."""

    method: str | None = None
    """Which certificate, by its name in `certify.CERTIFICATES`; that of `config`, or center."""
    num_images: int = 200
    """Evenly spaced subset of the images."""
    seed: int = 0
    """Of the noise and of the distance distribution."""
    probe: ProbeLike | None = None
    """Of randomized: checkpoint directory of a linear probe, or nearest."""
    class_map: tuple[str, ...] = ()
    """THEIRS=OURS each: classes of the images whose names differ from the probe's."""
    batch_size: int | None = None
    """Samples per device and forward pass; by default from the device's memory."""
    num_distribution: int = 100_000
    """Of center: clean images, at most, of the distance distribution F."""
    config: tyro.conf.Suppress[Any] = None
    """The settings of the certificate; by default those of its first preset."""

    @classmethod
    def command(cls) -> type[Self]:
        """With a group of flags for the settings of each certificate."""
        return _command(tuple(CERTIFICATES.items()))

    @property
    def certificate(self) -> str:
        """Name of the certificate."""
        return self.method or ("center" if self.config is None else kind_of(self.config))

    @property
    def smoothing(self) -> Any:
        """Settings of the certificate."""
        if self.config is not None:
            return self.config
        return getattr(self, self.certificate, None) or self._kind.preset()

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
        if self._takes_probe:
            found["probe"] = _NEAREST if self.probe == _NEAREST else "trained"
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
        if not job._takes_probe or not isinstance(job.probe, str) or job.probe == _NEAREST:
            return job
        if not checkpoints.is_saved(job.probe):
            return job
        return dataclasses.replace(job, probe=load_probe(job.probe, job.model))

    def check(self, mesh: Mesh) -> None:
        if type(self.smoothing) is not self._kind.settings:
            raise UserError(
                f"Expected {self._kind.settings.__name__} for the certificate "
                f"{self.certificate!r}, got {type(self.smoothing).__name__}."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"Expected batch_size >= 1, got {self.batch_size}.")
        indices = evenly_spaced(len(self.source()), self.num_images)
        if not self._takes_probe or self.probe == _NEAREST:
            return
        if self.probe is None:
            raise UserError(
                f"Expected --probe with --method {self.certificate}: a checkpoint directory of a "
                "linear probe, or nearest, which needs no labels."
            )
        if isinstance(self.probe, str):
            raise NotFoundError(f"There is no probe at {self.probe}; check the path, or train one.")
        if self.source().class_names:
            self._classes()
            check_labelled(self.source(), indices)

    def compute(self, session: Session) -> None:
        model, labels = self._smoothed(session)
        size = self.batch_size or self._fitting_batch_size(session, model)
        rows = finished(session.run)  # of all hosts: there may have been another number of them
        mine = self._indices[session.host :: session.num_hosts]
        done = np.isin(mine, rows["index"] if rows else ())
        certified = np.isin(mine, rows["index"][~rows["abstained"]] if rows else ())
        images = _Images(self, labels, mine[~done])
        with counted(session.progress, "certificates", len(mine)) as update:
            meter = _Meter(len(mine), int(done.sum()), int(certified.sum()), update)
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
            self._keep(session, certificates, images, meter)
            meter.show()
        unreadable = np.array(sorted(images.unreadable.items()), np.str_).reshape(-1, 2)
        session.run.write_part(f"unreadable-{session.host}", 0, {"unreadable": unreadable})
        if self._kind.relative is not None:
            self._clean_of_distribution(session)

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
        return self.summary(
            list(self._kind.rows(columns, self.smoothing)),
            self._unreadable(run, columns["index"]),
            samples=int(columns["num_drawn"].sum()),
            images=len(columns["index"]),
        )

    def draw(self, session: Session) -> None:
        from ur_jax.report import plots  # needs matplotlib, of the extra "report"

        columns = runs.read_table(session.run.path / "certificates.parquet")
        curves = list(self._kind.curves(columns))
        if curves:
            panels = [(curve.x, curve.value, curve.x_label) for curve in curves]
            plots._plot_fractions(session.run.path / "curves.png", panels, curves[0].y_label)

    @classmethod
    def curves(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Curve]:
        kind = CERTIFICATES.get(summary.identity.get("method"))
        if kind is not None:
            yield from kind.curves(runs.read_table(folder / "certificates.parquet"))

    @classmethod
    def remarks(cls, summary: Summary) -> Iterator[str]:
        yield from super().remarks(summary)
        samples, images = summary.details["samples"], summary.details["images"]
        yield f"{samples:,} samples, {samples / images:,.0f} per image."

    @property
    def _kind(self) -> CertificateKind:
        """The certificate."""
        return CERTIFICATES[self.certificate]

    @property
    def _takes_probe(self) -> bool:
        """Whether a classifier is certified."""
        return self._kind.smooths == "classifier"

    @functools.cached_property
    def _indices(self) -> np.ndarray:
        """Positions of the images to certify."""
        return evenly_spaced(len(self.source()), self.num_images)

    def _classes(self) -> np.ndarray:
        """The probe's class of each of the images' classes."""
        assert isinstance(self.probe, Classifier), self.probe
        names, number = self.probe.class_names, self.probe.bias.shape[0]
        return match_probe(self.source(), names, number, self.class_map)

    def _smoothed(self, session: Session) -> tuple[Encoder | Classifier, Labels]:
        """What is smoothed, and the labels of a batch, in its classes."""
        if not self._takes_probe:
            return self.model, lambda batch: batch.labels
        if isinstance(self.probe, Classifier):
            return self.probe, self._labels
        # Every host needs them all, on one device: the same bits on any number of them.
        alone = dataclasses.replace(_on_one_device(session), host=0, num_hosts=1)
        stage = parts.Stage("clean", "clean representations", (self._indices,), BANK_BATCH)
        clean = parts.clean_representations(alone, self.model, self.source(), stage)
        own = {int(index): label for label, index in enumerate(clean["index"])}
        classifier = nearest_image_classifier(self.model, clean["clean"])
        return classifier, lambda batch: np.array([own.get(int(i), -1) for i in batch.indices])

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

    def _fitting_batch_size(self, session: Session, model: Encoder | Classifier) -> int:
        """What fits the device's memory; what the run began with, if it did."""
        run, stage = session.run, f"batch_size-{session.host}"
        if not run.num_parts(stage):
            size = fit_batch_size(lambda m, x: m(x), model, (*self.model.input_size, 3))
            run.write_part(stage, 0, {"batch_size": [size]})
        return int(run.read_parts(stage)["batch_size"][0])

    def _keep(
        self,
        session: Session,
        certificates: Iterable[tuple[int, Certificate]],
        images: _Images,
        meter: _Meter,
    ) -> None:
        """Writes finished rows every few seconds."""
        run, stage = session.run, f"{_STAGE}-{session.host}"
        rows: list[dict[str, Any]] = []
        number, last = run.num_parts(stage), time.monotonic()

        def write():
            run.write_part(stage, number, {name: [row[name] for row in rows] for name in rows[0]})

        for index, certificate in certificates:
            row = {**images.described.pop(index), "seed": self.seed, **certificate._asdict()}
            if certificate.num_bad:
                warnings.warn(
                    f"{row['name']}: {certificate.num_bad} outputs are NaN or infinite; not "
                    f"certified. Check the encoder on this image, or use float32.",
                    stacklevel=3,
                )
            texts = {k: ", ".join(v) for k, v in row.items() if isinstance(v, tuple)}
            rows.append({**row, **texts, "seconds": meter.finished(certificate)})
            if time.monotonic() - last > _FLUSH_SECONDS:
                write()
                rows, number, last = [], number + 1, time.monotonic()
        if rows:
            write()

    def _unreadable(self, run: Run, readable: np.ndarray) -> dict[str, str]:
        """{name: reason} of the images without a certificate."""
        folder = run.path / "parts"
        stages = sorted(path.name for path in folder.glob("unreadable-*"))
        pairs = [tuple(row) for stage in stages for row in run.read_parts(stage)["unreadable"]]
        reasons = {str(name): str(reason) for name, reason in pairs}
        names = [self.source().name(int(i)) for i in np.setdiff1d(self._indices, readable)]
        return {name: reasons.get(name, "") for name in names}


def finished(run: Run) -> dict[str, np.ndarray]:
    """Finished rows of all hosts; {} if there are none."""
    stages = sorted(path.name for path in (run.path / "parts").glob(f"{_STAGE}-*"))
    found = [run.read_parts(stage) for stage in stages if run.num_parts(stage)]
    names = found[0] if found else ()
    return {name: np.concatenate([part[name] for part in found]) for name in names}


class _Images:
    """Readable images one by one, with what is known of each.

    Attributes:
      described: {index: columns} of the images that were taken.
      unreadable: {name: reason} of those that could not be.
    """

    def __init__(self, job: Certify, labels: Labels, indices: np.ndarray):
        self.job, self.labels, self.indices = job, labels, indices
        self.described: dict[int, dict[str, Any]] = {}
        self.unreadable: dict[str, str] = {}
        self._taken: list[int] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        if not len(self.indices):
            return
        encoder = self.job.model
        batches = image_batches(
            self.job.source(), self.indices, input_size=encoder.input_size,
            preparation=encoder.preparation, batch_size=_LOAD_BATCH,
        )  # fmt: skip
        for batch in batches:
            self.unreadable |= dict(batch.unreadable)
            labels = self.labels(batch)
            for row in np.flatnonzero(batch.mask):
                index, label = int(batch.indices[row]), int(labels[row])
                self.described[index] = {"index": index, "name": batch.names[row], "label": label}
                self._taken.append(index)
                yield batch.images[row]

    def taken(self) -> Iterator[int]:
        """The index of each image that was taken, asked for after it."""
        while True:
            yield self._taken.pop(0)


class _Meter:
    """Counts samples and images, and shows them.

    Args:
      num_images: of this host.
      num_done: finished ones, also those of earlier sessions.
      num_certified: those of them that are certified.
      update: shows a number of images and a text.
    """

    def __init__(self, num_images: int, num_done: int, num_certified: int, update: Any):
        self.num_images, self.num_done, self.num_certified = num_images, num_done, num_certified
        self.update = update
        self.samples = self.session_done = self.session_drawn = 0
        self.start = time.monotonic()

    def sampled(self, num_samples: int) -> None:
        """Takes further samples into account."""
        self.samples += num_samples
        self.show()

    def finished(self, certificate: Certificate) -> float:
        """Takes a finished image into account; returns the seconds that its samples took."""
        self.num_done += 1
        self.num_certified += not certificate.abstained
        self.session_done += 1
        self.session_drawn += certificate.num_drawn
        return certificate.num_drawn / max(self.rate(), 1e-9)

    def rate(self) -> float:
        """Samples per second, of this session."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        return max(self.samples, self.session_drawn) / seconds

    def show(self) -> None:
        """How far it is: images decided one after the other say little, samples per image do."""
        left = "time left unknown"
        if self.session_done:
            samples = (self.num_images - self.num_done) * self.session_drawn / self.session_done
            left = f"{samples / max(self.rate(), 1e-9):,.0f} s left"
        text = f"{self.num_certified} certified, {self.rate():,.0f} samples/s, {left}"
        self.update(self.num_done, text)


def _on_one_device(session: Session) -> Session:
    """The session with one device: the same bits on any number of them."""
    return dataclasses.replace(session, mesh=devices.data_mesh(jax.local_devices()[:1]))


@functools.cache
def _command(kinds: tuple[tuple[str, CertificateKind], ...]) -> type[Certify]:
    """The job with a field for the settings of each certificate, and its presets."""
    names = tuple(name for name, _ in kinds)
    choice = Annotated[Literal[names], tyro.conf.arg(help="Which certificate.")]
    fields: list[tuple] = [("method", choice, dataclasses.field(default=names[0]))]
    fields += [(n, kind.settings, dataclasses.field(default=kind.preset())) for n, kind in kinds]
    job = dataclasses.make_dataclass(
        "Certify", fields, bases=(Certify,), frozen=True, kw_only=True,
        namespace={"__doc__": Certify.__doc__, "__module__": __name__},
    )  # fmt: skip
    job.presets = {
        preset: job(**sizes, **{name: kind.preset(preset) for name, kind in kinds})
        for preset, sizes in _PRESETS.items()
    }
    return job


_PRESETS: dict[str, dict[str, int]] = {
    "adaptive": {},
    "quick": {"num_images": 16, "num_distribution": 512},
    "paper": {},
}
Certify.presets = Certify.command().presets
