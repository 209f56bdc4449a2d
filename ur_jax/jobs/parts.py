"""How a job computes its parts: one per batch, written as it finishes, divided over hosts.

What a part holds does not depend on who computes it, or after how many interruptions, since every
random draw is keyed by the image it belongs to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ur_jax import devices, runs
from ur_jax.data import ImageBatch, ImageSource, image_batches
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.jobs.base import Session
from ur_jax.metrics.checks import check_spread
from ur_jax.runs import Run
from ur_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Stage:
    """Parts of one name: rows of some images, or of tuples of images.

    Attributes:
      name: of the parts.
      title: for the progress.
      indices: positions in the source's listing, (N,) each; several where a row takes several
        images.
      batch_size: images per part, over all devices.
    """

    name: str
    title: str
    indices: tuple[np.ndarray, ...]
    batch_size: int

    @property
    def num_parts(self) -> int:
        """How many there are when all is done."""
        return math.ceil(len(self.indices[0]) / self.batch_size)

    def of_parts(self, numbers: Sequence[int]) -> tuple[np.ndarray, ...]:
        """The indices of some parts; only the very last part may be smaller."""
        size = self.batch_size
        return tuple(
            np.concatenate([each[n * size : (n + 1) * size] for n in numbers])
            for each in self.indices
        )


def run_stage(
    session: Session,
    stage: Stage,
    source: ImageSource,
    compute: Callable[..., Mapping[str, Any]],
    *,
    input_size: tuple[int, int],
    preparation: str,
) -> None:
    """Computes this host's missing parts of a stage, and keeps the rows of readable images.

    Args:
      session: the folder, the host, the progress.
      stage: which images, and how many a part has.
      source: the images.
      compute: a batch of each of the stage's indices -> {name: (B, ...)}; "index" and "unreadable"
        are added.
      input_size, preparation: of the images, as in `data.image_batches`.
    """
    run, every = session.run, range(session.host, stage.num_parts, session.num_hosts)
    missing = [n for n in every if not run.has_part(stage.name, n)]
    if not missing:
        return
    batches = [
        image_batches(
            source, indices, input_size=input_size, preparation=preparation,
            batch_size=stage.batch_size, num_workers=session.num_workers,
        )
        for indices in stage.of_parts(missing)
    ]  # fmt: skip
    watched = session.progress(zip(*batches, strict=True), stage.title, len(missing))

    def write(number: int, group: Sequence[ImageBatch], begun: Mapping[str, Any]) -> None:
        """Waits for a batch's values and keeps them."""
        values = jax.tree.map(np.asarray, dict(begun))
        run.write_part(stage.name, number, _readable_rows(group, values))

    # The device has the next batch before this one is written: it waits for neither disk nor host.
    before = None
    try:
        for number, group in zip(missing, watched, strict=True):
            last, before = before, (number, group, compute(*group))
            if last is not None:
                write(*last)
    finally:
        if before is not None:
            write(*before)


def clean_representations(
    session: Session, encoder: Encoder, source: ImageSource, stage: Stage
) -> dict[str, np.ndarray]:
    """Representations of the readable ones of some images, computed once and kept with the run.

    Args:
      session: the folder and the devices.
      encoder: the encoder.
      source: the images.
      stage: which ones.

    Returns:
      {"index": (N,), "clean": (N,D) float32, ...} of all hosts' parts so far.

    Raises:
      UserError: for a batch that does not divide over the devices, or an encoder that gives all
        images the same representation.
    """
    devices.check_divisible(stage.batch_size, session.mesh)
    encoder = devices.replicate(session.mesh, encoder)
    run_stage(
        session,
        stage,
        source,
        lambda batch: {"clean": encode(encoder, devices.shard(session.mesh, batch.images))},
        input_size=encoder.input_size,
        preparation=encoder.preparation,
    )
    found = session.run.read_parts(stage.name)
    if found:
        check_spread(found["clean"], f"encoder {encoder.name!r}")
    return found


def with_bank(
    session: Session, encoder: Encoder, source: ImageSource, num_images: int, batch_size: int
) -> Session:
    """The session whose folder is that of an encoder's clean representations of some images.

    Args:
      session: with the folder that holds those of all encoders and images, if they are shared.
      encoder: the encoder.
      source: the images.
      num_images: evenly spaced ones.
      batch_size: images per batch, over all devices.
    """
    if session.bank is None:
        return session
    described = {**loading.described(encoder), "images": source.content_hash}
    settings = {**described, "num_images": num_images, "batch_size": batch_size}
    folder = runs.as_folder(session.bank) / runs.fingerprint(settings)
    return dataclasses.replace(session, run=runs.open_run(folder, settings))


def unreadable(
    run: Run, *read: Mapping[str, np.ndarray], but: Iterable[str] = ()
) -> dict[str, str]:
    """{name: reason} of every image that some stage of a run could not read.

    Args:
      run: the run.
      *read: parts that lie elsewhere.
      but: names of stages that hold something else.
    """
    folder = run.path / "parts"
    stages = {path.name for path in folder.iterdir()} - set(but) if folder.exists() else set()
    parts: Iterator[Mapping[str, np.ndarray]] = map(run.read_parts, sorted(stages))
    found = [part["unreadable"] for part in (*read, *parts)]
    rows = np.concatenate(found).tolist() if found else []
    return {str(name): str(reason) for name, reason in sorted(map(tuple, rows))}


@jax.jit
def encode(encoder: Encoder, images: Array) -> Array:
    """The encoder, compiled."""
    return encoder(images)


def _readable_rows(
    group: Sequence[ImageBatch], values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The rows whose images could all be read, with their indices and what could not be."""
    mask = np.logical_and.reduce([batch.mask for batch in group])
    rows = {name: value[mask] for name, value in values.items()}
    skipped = [image for batch in group for image in batch.unreadable]
    rows["unreadable"] = np.array(skipped, np.str_).reshape(-1, 2)
    return rows | {"index": group[0].indices[mask]}
