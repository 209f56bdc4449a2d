"""The certificates of a host's images, as they are decided: written, and shown to who watches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ur_jax.certify.registry import Certificate
from ur_jax.data import ImageBatch, ImageSource, image_batches
from ur_jax.encoders.base import Encoder
from ur_jax.runs import Run

Labels = Callable[[ImageBatch], np.ndarray]
"""The labels (B,) of a batch, negative where there is none."""

_STAGE = "certificates"
_FLUSH_SECONDS = 5.0
_LOAD_BATCH = 8


def finished(run: Run) -> dict[str, np.ndarray]:
    """Finished rows of all hosts, one of each image, in no order; {} if there are none.

    A damaged part hides those after it, whose images are then certified anew, with the same rows,
    before it is there again: some may be there twice.
    """
    stages = sorted(path.name for path in (run.path / "parts").glob(f"{_STAGE}-*"))
    found = [run.read_parts(stage) for stage in stages if run.num_parts(stage)]
    names = found[0] if found else ()
    rows = {name: np.concatenate([part[name] for part in found]) for name in names}
    _, first = np.unique(rows.get("index", ()), return_index=True)
    return {name: values[first] for name, values in rows.items()}


def keep(
    run: Run,
    host: int,
    certificates: Iterable[tuple[int, Certificate]],
    images: Images,
    meter: Meter,
    **columns: Any,
) -> None:
    """Writes finished rows every few seconds.

    Args:
      run: the folder.
      host: whose parts these are.
      certificates: (index, certificate), in any order.
      images: what is known of each image.
      meter: tells the seconds, and is told what is finished.
      **columns: of every row, before the certificate's.
    """
    stage, rows = f"{_STAGE}-{host}", []
    number, last = run.num_parts(stage), time.monotonic()

    def write() -> None:
        run.write_part(stage, number, {name: [row[name] for row in rows] for name in rows[0]})

    for index, certificate in certificates:
        row = {**images.described.pop(index), **columns, **certificate._asdict()}
        if certificate.num_bad:
            warnings.warn(
                f"{row['name']}: {certificate.num_bad} outputs are NaN or infinite; not "
                f"certified. Check the encoder on this image, or use float32.",
                stacklevel=3,
            )
        row |= {name: ", ".join(value) for name, value in row.items() if isinstance(value, tuple)}
        rows.append(row | {"seconds": meter.finished(certificate)})
        if time.monotonic() - last > _FLUSH_SECONDS:
            write()
            rows, number, last = [], number + 1, time.monotonic()
    if rows:
        write()


class Images:
    """The readable ones of some images, one by one, with what is known of each.

    Args:
      source: the images.
      indices: positions of those to take.
      encoder: they are prepared for it.
      labels: of a batch.

    Attributes:
      described: {index: columns} of the images that were taken.
      unreadable: {name: reason} of those that could not be.
    """

    def __init__(self, source: ImageSource, indices: np.ndarray, encoder: Encoder, labels: Labels):
        self._source, self._indices, self._encoder = source, indices, encoder
        self._labels = labels
        self.described: dict[int, dict[str, Any]] = {}
        self.unreadable: dict[str, str] = {}
        self._taken: list[int] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        if not len(self._indices):
            return
        batches = image_batches(
            self._source, self._indices, input_size=self._encoder.input_size,
            preparation=self._encoder.preparation, batch_size=_LOAD_BATCH,
        )  # fmt: skip
        for batch in batches:
            self.unreadable |= dict(batch.unreadable)
            labels = self._labels(batch)
            for row in np.flatnonzero(batch.mask):
                index, label = int(batch.indices[row]), int(labels[row])
                self.described[index] = {"index": index, "name": batch.names[row], "label": label}
                self._taken.append(index)
                yield batch.images[row]

    def taken(self) -> Iterator[int]:
        """The index of each image that was taken, asked for after it."""
        while True:
            yield self._taken.pop(0)


class Meter:
    """Counts samples and images, and shows them.

    Args:
      num_images: of this host.
      num_done: finished ones, also those of earlier sessions.
      num_certified: those of them that are certified.
      update: shows a number of images and a text.
    """

    def __init__(
        self, num_images: int, num_done: int, num_certified: int, update: Callable[[int, str], Any]
    ):
        self.num_images, self.num_done, self.num_certified = num_images, num_done, num_certified
        self._update = update
        self._samples = self._session_done = self._session_drawn = 0
        self._start = time.monotonic()

    def sampled(self, num_samples: int) -> None:
        """Takes further samples into account."""
        self._samples += num_samples
        self.show()

    def finished(self, certificate: Certificate) -> float:
        """Takes a finished image into account; returns the seconds that its samples took."""
        self.num_done += 1
        self.num_certified += not certificate.abstained
        self._session_done += 1
        self._session_drawn += certificate.num_drawn
        return certificate.num_drawn / max(self._rate(), 1e-9)

    def show(self) -> None:
        """How far it is; what is left is told from the samples that an image took so far."""
        left = "time left unknown"
        if self._session_done:
            images = self.num_images - self.num_done
            samples = images * self._session_drawn / self._session_done
            left = f"{samples / max(self._rate(), 1e-9):,.0f} s left"
        text = f"{self.num_certified} certified, {self._rate():,.0f} samples/s, {left}"
        self._update(self.num_done, text)

    def _rate(self) -> float:
        """Samples per second, of this session."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return max(self._samples, self._session_drawn) / seconds
