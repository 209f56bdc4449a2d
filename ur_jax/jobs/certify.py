"""Certificates of many images: what is finished so far, the table, and the summary's numbers.

A `Job` wires the certificates to images, devices and a run's folder. Finished images are written as
parts every few seconds and skipped by a run that resumes, which ends with the same table, byte for
byte, since the noise of an image is keyed by its index.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax import devices, metrics, runs
from ur_jax.certify import (
    CenterCertificate,
    CenterConfig,
    Classifier,
    RadiusCertificate,
    RandomizedConfig,
    center_smoothing,
    certified_radius,
    check_labels,
    lower_bound,
    nearest_image_classifier,
    randomized_smoothing,
)
from ur_jax.data import ImageSource, evenly_spaced, image_batches
from ur_jax.devices.memory import fit_batch_size
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.jobs import probe as probing
from ur_jax.jobs.label_free import Progress, clean_representations
from ur_jax.stats import intervals
from ur_jax.stats.intervals import Estimate
from ur_jax.types import Array

RADII = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Radii of the certified accuracy that is reported: the paper's, and 0.5."""

BANK_BATCH = 64
"""Images per batch of a shared bank, over all devices."""

_STAGE = "certificates"
_FLUSH_SECONDS = 5.0
_LOAD_BATCH = 8


class Figures(NamedTuple):
    """How far a host is with its images.

    Attributes:
      num_images: all of its images.
      num_done: finished ones, also those of earlier sessions.
      num_certified: those of them that are certified.
      samples_per_second: of this session.
      seconds_left: until all are done; None before the first one is.
    """

    num_images: int
    num_done: int
    num_certified: int
    samples_per_second: float
    seconds_left: float | None


class Certification(NamedTuple):
    """What `Job.finish` returns; per-image values are in `certificates.parquet`.

    Attributes:
      estimates: {measure: value with its 95 % interval over the images}.
      num_samples: all samples drawn.
      unreadable: names of the images left out.
    """

    estimates: dict[str, Estimate]
    num_samples: int
    unreadable: list[str]


def load_probe(path: str | os.PathLike, encoder: Encoder) -> dict[str, Array]:
    """Reads a linear probe on an encoder.

    Args:
      path: checkpoint directory.
      encoder: the encoder, with representations of dimension D.

    Returns:
      {"kernel": [D, K], "bias": [K]}.

    Raises:
      ValueError: for a checkpoint of something else, or a probe on another representation or
        other weights.
    """
    return probing.restore_probe(path, encoder)[0]


@dataclasses.dataclass(frozen=True)
class Job:
    """Certificates of some images, in a run's folder; on several hosts, the same job on each.

    Attributes:
      encoder: the encoder.
      source: images, from `data.open_images`.
      indices: (N,) the positions of those to certify.
      run: the folder, from `runs.open_run`.
      config: the settings, which choose between center and randomized smoothing.
      probe: of randomized smoothing, from `load_probe`; None for the classifier into the nearest
        clean image, whose classes and labels are the readable ones of the images themselves.
      seed: of the noise and of the distance distribution.
      progress: shows how far the encoding of clean images is.
      bank: folder of the distance distribution's clean representations, shared with other runs,
        from `evaluation.open_bank`; by default the run keeps its own.
    """

    encoder: Encoder
    source: ImageSource
    indices: np.ndarray
    run: runs.Run
    config: CenterConfig | RandomizedConfig
    probe: Mapping[str, Array] | None = None
    seed: int = 0
    progress: Progress = lambda iterable, description, total: iterable
    bank: runs.Run | None = None

    def certify(
        self,
        *,
        host: int = 0,
        num_hosts: int = 1,
        mesh: Mesh | None = None,
        batch_size: int | None = None,
        on_progress: Callable[[Figures], Any] = lambda figures: None,
    ) -> None:
        """Certifies this host's share of the images, but for those that are finished.

        Args:
          host: number of this host; it takes every `num_hosts`-th image.
          num_hosts: how many there are.
          mesh: this host's devices; all local ones by default.
          batch_size: samples per device and forward pass; by default from the device's memory,
            and a resumed run keeps it.
          on_progress: called every few seconds, not before all encoding is done, and at the end.

        Raises:
          ValueError: for a batch size below 1, or a label that is no class of the probe.
        """
        if batch_size is not None and batch_size < 1:
            raise UserError(f"Expected batch_size >= 1, got {batch_size}.")
        mine = self.indices[host::num_hosts]
        rows = self._rows()  # of all hosts: there may have been another number of them
        done = np.isin(mine, rows["index"] if rows else ())
        certified = np.isin(mine, rows["index"][~rows["abstained"]] if rows else ())
        model, labels = self._model()
        batch_size = batch_size or self._fitting_batch_size(model, host)
        described: dict[int, dict[str, Any]] = {}
        taken: list[int] = []
        meter = _Meter(len(mine), int(done.sum()), int(certified.sum()), on_progress)
        smooth = center_smoothing if self._is_center else randomized_smoothing
        certificates = smooth(
            model,
            self._images(mine[~done], model, labels, described, taken),
            jax.random.key(self.seed),
            config=self.config,
            indices=iter(lambda: taken.pop(0), None),  # asked for after each image
            mesh=mesh,
            batch_size=batch_size,
            on_progress=meter.sampled,
        )
        self._keep(f"{_STAGE}-{host}", certificates, described, meter)
        meter.show()

    def finish(self, num_distribution: int = 100_000) -> Certification:
        """Merges the rows of all hosts: writes `certificates.parquet` and `times.parquet`.

        Args:
          num_distribution: of center smoothing: evenly spaced clean images, at most, of the
            distance distribution F that eps_out is compared with.

        Raises:
          ValueError: if none of the images could be read.
        """
        rows = self._rows()
        if not rows:
            raise UserError(f"None of the {len(self.indices)} images could be read; see above.")
        order = np.argsort(rows["index"])
        columns = {name: values[order] for name, values in rows.items()}
        times = {"index": columns["index"], "seconds": columns.pop("seconds")}
        runs.write_table(self.run.path / "times.parquet", times)
        if self._is_center:
            columns |= self._relative(columns["eps_out"], num_distribution)
            estimates = _center_estimates(columns)
        else:
            estimates = _radius_estimates(columns, self.config)
        lists = {name: list(values) for name, values in columns.items()}  # some hold rows (N,K)
        runs.write_table(self.run.path / "certificates.parquet", lists)
        missing = np.setdiff1d(self.indices, columns["index"])
        return Certification(
            estimates=estimates,
            num_samples=int(columns["num_drawn"].sum()),
            unreadable=[self.source.name(int(i)) for i in missing],
        )

    @property
    def _is_center(self) -> bool:
        """Whether this is center smoothing."""
        return isinstance(self.config, CenterConfig)

    def _rows(self) -> dict[str, np.ndarray]:
        """Finished rows of all hosts; {} if there are none."""
        stages = sorted(path.name for path in (self.run.path / "parts").glob(f"{_STAGE}-*"))
        parts = [self.run.read_parts(stage) for stage in stages if self.run.num_parts(stage)]
        names = parts[0] if parts else ()
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _clean(self, stage: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Clean representations, on one device: the same bits on any number of them."""
        if stage == "distribution" and self.bank is not None:
            return clean_representations(
                self.encoder, self.source, self.bank, indices,
                batch_size=BANK_BATCH, progress=self.progress,
            )  # fmt: skip
        mesh = devices.data_mesh(jax.local_devices()[:1])
        return clean_representations(
            self.encoder, self.source, self.run, indices,
            stage=stage, mesh=mesh, progress=self.progress,
        )  # fmt: skip

    def _model(self) -> tuple[Encoder | Classifier, dict[int, int]]:
        """What is smoothed, and labels {index: class} that replace those of the source."""
        if self._is_center:
            return self.encoder, {}
        if self.probe is not None:
            kernel, bias = jnp.asarray(self.probe["kernel"]), jnp.asarray(self.probe["bias"])
            return Classifier(self.encoder, kernel, bias), {}
        clean = self._clean("clean", self.indices)
        labels = {int(index): label for label, index in enumerate(clean["index"])}
        return nearest_image_classifier(self.encoder, clean["clean"]), labels

    def _fitting_batch_size(self, model: Encoder | Classifier, host: int) -> int:
        """What fits the device's memory; what the run began with, if it did."""
        stage = f"batch_size-{host}"
        if not self.run.num_parts(stage):
            size = fit_batch_size(lambda m, x: m(x), model, (*self.encoder.input_size, 3))
            self.run.write_part(stage, 0, {"batch_size": [size]})
        return int(self.run.read_parts(stage)["batch_size"][0])

    def _images(self, indices, model, labels, described, taken) -> Iterator[np.ndarray]:
        """Readable images; notes what is known of each in `described`, and its index in `taken`."""
        if not len(indices):
            return
        batches = image_batches(
            self.source, indices, input_size=self.encoder.input_size,
            preparation=self.encoder.preparation, batch_size=_LOAD_BATCH,
        )  # fmt: skip
        for batch in batches:
            for row in np.flatnonzero(batch.mask):
                index = int(batch.indices[row])
                label = labels.get(index, int(batch.labels[row]))
                if not self._is_center and label >= 0:
                    check_labels(np.array([label]), model.bias.shape[0])
                described[index] = {"index": index, "name": batch.names[row], "label": label}
                taken.append(index)
                yield batch.images[row]

    def _keep(
        self,
        stage: str,
        certificates: Iterable[tuple[int, CenterCertificate | RadiusCertificate]],
        described: dict[int, dict[str, Any]],
        meter: _Meter,
    ) -> None:
        """Writes finished rows every few seconds."""
        rows: list[dict[str, Any]] = []
        number, last = self.run.num_parts(stage), time.monotonic()

        def write():
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            self.run.write_part(stage, number, columns)

        for index, certificate in certificates:
            row = {**described.pop(index), "seed": self.seed, **certificate._asdict()}
            if certificate.num_bad:
                warnings.warn(
                    f"{row['name']}: {certificate.num_bad} outputs are NaN or infinite; not "
                    f"certified. Check the encoder on this image, or use float32.",
                    stacklevel=3,
                )
            if "decisions" in row:
                row["decisions"] = ", ".join(row["decisions"])
            rows.append({**row, "seconds": meter.finished(certificate)})
            if time.monotonic() - last > _FLUSH_SECONDS:
                write()
                rows, number, last = [], number + 1, time.monotonic()
        if rows:
            write()

    def _relative(self, eps_out: np.ndarray, num_distribution: int) -> dict[str, np.ndarray]:
        """F(eps_out) and eps_out / median F; 1 and infinity where it abstained."""
        total = len(self.source)
        clean = self._clean("distribution", evenly_spaced(total, min(total, num_distribution)))
        distribution = metrics.distance_distribution(
            jnp.asarray(clean["clean"]),
            jax.random.key(self.seed),
            divergence=self.config.divergence,
        )
        distances = jnp.asarray(eps_out.astype(np.float32))
        return {
            "quantile": np.asarray(metrics.universal_quantile(distribution, distances)),
            "normalised": np.asarray(metrics.normalised_distance(distribution, distances)),
        }


@dataclasses.dataclass
class _Meter:
    """Counts samples and images, and shows the figures."""

    num_images: int
    num_done: int
    num_certified: int
    on_progress: Callable[[Figures], Any]

    def __post_init__(self):
        self.samples = self.session_done = self.session_drawn = 0
        self.start = time.monotonic()

    def sampled(self, num_samples: int) -> None:
        """Takes further samples into account."""
        self.samples += num_samples
        self.show()

    def finished(self, certificate: CenterCertificate | RadiusCertificate) -> float:
        """Takes a finished image into account; returns the seconds that its samples took."""
        self.num_done += 1
        self.num_certified += not certificate.abstained
        self.session_done += 1
        self.session_drawn += certificate.num_drawn
        return certificate.num_drawn / max(self.rate(), 1e-9)

    def rate(self) -> float:
        """Samples per second, of this session."""
        return max(self.samples, self.session_drawn) / (time.monotonic() - self.start)

    def show(self) -> None:
        """Passes the figures on."""
        rate, left = self.rate(), None
        if self.session_done:
            samples = (self.num_images - self.num_done) * self.session_drawn / self.session_done
            left = samples / max(rate, 1e-9)
        self.on_progress(Figures(self.num_images, self.num_done, self.num_certified, rate, left))


def _center_estimates(columns: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """Fraction certified, and medians over all images."""
    names = ("eps_out", "quantile", "normalised")
    medians = {f"median {name}": _median_with_infinity(columns[name]) for name in names}
    return {"certified": _share(~columns["abstained"])} | medians


def _radius_estimates(
    columns: dict[str, np.ndarray], config: RandomizedConfig
) -> dict[str, Estimate]:
    """Certified accuracy at radii and average radius; without labels, of what is certified."""
    label, radius, certified = columns["label"], columns["radius"], ~columns["abstained"]
    largest = certified_radius(lower_bound(config.n, config.n, config), config.sigma)
    bounds = (0.0, max(largest, float(radius.max())))
    table = {"certified": _share(certified)}
    if (label < 0).any():
        table |= {f"certified at radius {r:g}": _share(radius >= r) for r in RADII[1:]}
        return table | {"mean radius": intervals.mean_interval(radius, bounds=bounds)}
    correct = certified & (columns["predicted"] == label)
    table |= {f"certified accuracy at radius {r:g}": _share(correct & (radius >= r)) for r in RADII}
    # MACER's definition counts an incorrect image 0; the published code leaves it out.
    counted = np.where(correct, radius, 0.0)
    table["average certified radius"] = intervals.mean_interval(counted, bounds=bounds)
    if correct.any():
        over_correct = intervals.mean_interval(radius[correct], bounds=bounds)
        table["average certified radius, correct only"] = over_correct
    return table


def _share(hits: np.ndarray) -> Estimate:
    """Share of images with a property."""
    return intervals.proportion_interval(int(hits.sum()), len(hits))


def _median_with_infinity(values: np.ndarray) -> Estimate:
    """Median with its interval, where an abstention is the largest value of all."""
    largest = np.finfo(np.float64).max
    value, low, high, n = intervals.median_interval(np.minimum(values.astype(np.float64), largest))
    value, low, high = (math.inf if v > largest / 4 else v for v in (value, low, high))
    return Estimate(value, low, high, n)
