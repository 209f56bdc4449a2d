"""Loading: evenly spaced subsets, batches of one static shape, whole data sets in memory."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import numpy as np
from absl import flags

from ur_jax.checks import check_type, whole_number
from ur_jax.data.cached import prepare_all
from ur_jax.data.pixels import check_preparation, check_size
from ur_jax.data.sources import ImageSource
from ur_jax.errors import UserError, shown

if TYPE_CHECKING:
    import grain

_LARGEST_BATCH = 4096  # that there may be for fewer images
_FEW_THREADS = 4  # on any machine: some wait for the disk
_MANY_THREADS = 32  # beyond them they wait for Python
_BUFFERED = 2**30  # bytes of loaded batches beyond those of the few


class Unreadable(NamedTuple):
    """An image that was skipped, and why."""

    name: str
    reason: str


class ImageBatch(NamedTuple):
    """B prepared images; a row whose `mask` is False is padding or stands for an unreadable image.

    Attributes:
      images: (B, H, W, 3) float32 in [0, 1]; an unreadable image is uniformly grey.
      labels: (B,) int32; -1 for none.
      indices: (B,) int64, positions in the source's listing; padding repeats the last one.
      names: B names from the source; padding repeats the last one.
      mask: (B,) bool.
      unreadable: the images of this batch that could not be read.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    names: list[str]
    mask: np.ndarray
    unreadable: list[Unreadable]


class DecodedImages(NamedTuple):
    """The readable images of a small data set, in memory.

    Attributes:
      images: (N, H, W, 3) uint8.
      labels: (N,) int32; -1 for none.
      indices: (N,) int64, positions in the source's listing.
      unreadable: the images left out.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    unreadable: list[Unreadable]


def evenly_spaced(
    total: SupportsIndex, n: SupportsIndex, *, what: str = "num_images"
) -> np.ndarray:
    """Returns the n evenly spaced indices of a listing: floor(i (total - 1) / (n - 1)).

    Args:
      total: length of the listing.
      n: number of indices, 1 <= n <= total; n = 1 gives index 0.
      what: the setting that n is, for messages.

    Returns:
      (n,) int64, increasing, with the first and the last of the listing.

    Raises:
      UserError: n is no whole number, n < 1, or more samples than images.

    Reference: section 4 of the paper's protocol; the authors' code computes the same.
    """
    flag = f"--{what.replace('_', '-')}"
    total, n = whole_number(total, "total"), whole_number(n, what)
    if n < 1:
        raise UserError(f"Expected at least 1 sample, got {n} by {what}; give {flag} 1 or more.")
    if total > 2**53:
        raise UserError(f"Expected a listing of at most 2**53 images, got {total}.")
    if n > total:
        raise UserError(
            f"Asked for {n} samples of a listing of {total} images by {what}; give {flag} {total} "
            "or fewer, or more images."
        )
    return np.linspace(0, total - 1, n).astype(np.int64)


def check_workers(num_workers: int) -> None:
    """Raises UserError for a number of worker processes that this machine would choke on.

    Each is a Python of its own that takes seconds to start: more of them than cores wait for each
    other, and nothing is seen of the run meanwhile. Four are allowed anywhere.
    """
    most = max(4, os.cpu_count() or 1)
    if not 0 <= whole_number(num_workers, "num_workers") <= most:
        raise UserError(
            f"Expected num_workers >= 0 and at most {most} on the {os.cpu_count()} cores of this "
            f"machine, got {num_workers}; give --num-workers {most} or fewer, 0 for threads alone."
        )


def check_batch_size(batch_size: int, num_images: int, input_size: tuple[int, int]) -> None:
    """Raises UserError for a batch that is mostly padding, or that no memory holds.

    Args:
      batch_size: images per batch.
      num_images: how many there are in all. A batch has its full size however few they are.
      input_size: (H, W) of the images.
    """
    most = max(_LARGEST_BATCH, whole_number(num_images, "num_images"))
    if not 1 <= whole_number(batch_size, "batch_size") <= most:
        raise UserError(
            f"Expected batch_size >= 1 and at most {most} for {num_images} images, got "
            f"{batch_size}; give --batch-size {min(most, 64)}, for instance."
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = 4 * 3 * math.prod(check_size(input_size, "input_size"))  # of one image, in float32
    if batch_size * needed > memory:
        raise UserError(
            f"Expected batch_size to fit in memory, got {batch_size}: its pixels alone take "
            f"{batch_size * needed / 2**30:.1f} GiB of {memory / 2**30:.1f}; the network takes "
            "many times that. Give a smaller --batch-size."
        )


def image_batches(
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    *,
    input_size: tuple[int, int],
    preparation: str,
    batch_size: int,
    num_workers: int = 0,
    start: int = 0,
) -> Iterator[ImageBatch]:
    """Loads images in the order of `indices`, every batch of the same static shape.

    The last batch is padded by repeating its last image. An image whose content does not decode is
    masked out, warned of and listed in its batch; it never stops the iteration. Storage that does
    not answer does, once that was tried a few times.

    Args:
      source: from `open_images`.
      indices: (N,) positions in the source's listing.
      input_size: (H, W) of the encoder.
      preparation: see `prepare`.
      batch_size: B.
      num_workers: Grain worker processes; 0 loads in threads of this one. Workers are spawned, so a
        script needs `if __name__ == "__main__"`, and the first batch takes seconds longer.
      start: number of leading batches to leave out: a resumed run gives those it has finished.

    Returns:
      An iterator of ceil(N / B) - start batches, the same for every `num_workers`.

    Raises:
      UserError: at once, for an argument out of its range.
      StorageError: while iterating, if an image cannot be read though tried again.
    """
    batches = image_batches_uint8(
        source, indices, input_size=input_size, preparation=preparation,
        batch_size=batch_size, num_workers=num_workers, start=start,
    )  # fmt: skip
    return (
        batch._replace(images=np.divide(batch.images, np.float32(255), dtype=np.float32))
        for batch in batches
    )


def image_batches_uint8(
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    *,
    input_size: tuple[int, int],
    preparation: str,
    batch_size: int,
    num_workers: int = 0,
    start: int = 0,
) -> Iterator[ImageBatch]:
    """`image_batches` with its pixels as uint8 in [0, 255]; arguments and errors as there."""
    dataset = _dataset(
        source, indices, input_size=input_size, preparation=preparation,
        batch_size=batch_size, num_workers=num_workers, start=start,
    )  # fmt: skip
    return _warned(dataset)


def load_uint8(
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    *,
    input_size: tuple[int, int],
    preparation: str,
    num_workers: int = 0,
) -> DecodedImages:
    """Decodes a small data set once into memory, leaving out (and reporting) unreadable images.

    Args:
      source: from `open_images`.
      indices: (N,) positions in the source's listing.
      input_size: (H, W).
      preparation: see `prepare`.
      num_workers: as in `image_batches`.

    Returns:
      The readable images in the order of `indices`.

    Raises:
      ValueError: for an argument out of its range.
    """
    dataset = _dataset(
        source, indices, input_size=input_size, preparation=preparation,
        batch_size=256, num_workers=num_workers, start=0,
    )  # fmt: skip
    images = np.empty((len(indices), *input_size, 3), np.uint8)
    labels, kept, unreadable = [], [], []
    for batch in _warned(dataset):
        count = len(kept)
        readable = np.flatnonzero(batch.mask)
        images[count : count + len(readable)] = batch.images[readable]
        labels.extend(batch.labels[readable])
        kept.extend(batch.indices[readable])
        unreadable += batch.unreadable
    return DecodedImages(
        images[: len(kept)], np.array(labels, np.int32), np.array(kept, np.int64), unreadable
    )


class _Batches:
    """Random access to whole uint8 batches, the elements that Grain loads in parallel and order."""

    def __init__(self, source, indices, input_size, preparation, batch_size, start):
        self._source, self._indices, self._start = source, indices, start
        self._input_size, self._preparation = input_size, preparation
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch_size) - self._start

    def __getitem__(self, index: int) -> ImageBatch:
        size = self._batch_size
        first = (self._start + index) * size
        chosen = self._indices[first : first + size]
        # Grey where unreadable: a zero image can have a zero representation, whose cosine is NaN.
        images = np.full((size, *self._input_size, 3), 128, np.uint8)
        labels = np.full(size, -1, np.int32)
        mask = np.zeros(size, bool)
        unreadable = []
        prepared = prepare_all(
            self._source, chosen.tolist(),
            input_size=self._input_size, preparation=self._preparation,
        )  # fmt: skip
        for row, (pixels, label, reason) in enumerate(prepared):
            if pixels is None:
                unreadable.append(Unreadable(self._source.name(int(chosen[row])), reason))
            else:
                images[row], labels[row], mask[row] = pixels, label, True
        last = len(chosen) - 1
        images[last + 1 :], labels[last + 1 :] = images[last], labels[last]
        padded = np.concatenate([chosen, np.repeat(chosen[-1:], size - len(chosen))])
        names = [self._source.name(image) for image in padded.tolist()]
        return ImageBatch(images, labels, padded, names, mask, unreadable)


def _dataset(
    source, indices, *, input_size, preparation, batch_size, num_workers, start
) -> grain.IterDataset:
    """Checks the arguments and builds the Grain pipeline of uint8 batches."""
    import grain  # takes as long as JAX

    check_type("source", source, ImageSource)
    indices = checked_indices(source, indices)
    check_preparation(preparation)
    check_batch_size(batch_size, len(indices), input_size)
    start = whole_number(start, "start")
    check_workers(num_workers)
    num_batches = -(-len(indices) // batch_size)
    if not 0 <= start <= num_batches:
        raise UserError(
            f"Expected start in [0, {num_batches}], the number of batches, got {start}."
        )
    batches = _Batches(source, indices, tuple(input_size), preparation, batch_size, start)
    num_workers = min(num_workers, num_batches - start)  # more would start for nothing
    # Pillow releases the interpreter lock, so threads help a lone process; inside workers they only
    # contend. The buffer is counted in batches.
    threads = 1 if num_workers else _num_threads(batch_size * 3 * math.prod(input_size))
    dataset = grain.MapDataset.source(batches).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's processes ask absl, which only absl.app runs
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return dataset


def _num_threads(nbytes: int) -> int:
    """Threads that load batches of so many bytes: one per core, of which each holds a batch."""
    most = max(_FEW_THREADS, min(_MANY_THREADS, os.cpu_count() or 1))
    return min(most, max(_FEW_THREADS, _BUFFERED // nbytes))


def checked_indices(source: ImageSource, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Indices as an array, once they are known to be of the listing."""
    try:
        array = np.asarray(indices)
    except ValueError:  # ragged
        raise UserError(f"Expected a flat list of indices, got {shown(indices)}.") from None
    if array.size and array.dtype.kind not in "iu":
        raise UserError(f"Expected indices as whole numbers, got {array.dtype}.")
    array = array.astype(np.int64)
    if array.ndim != 1:
        raise UserError(f"Expected a flat list of indices, got shape {array.shape}.")
    if array.size and not (0 <= array.min() and array.max() < len(source)):
        raise UserError(
            f"Expected indices in [0, {len(source)}) for {source.spec!r}, got "
            f"{array.min()} to {array.max()}."
        )
    return array


def _warned(dataset: grain.IterDataset) -> Iterator[ImageBatch]:
    """Passes batches on, warning of each unreadable image."""
    with contextlib.closing(iter(dataset)) as batches:  # ends the workers if the caller stops early
        for batch in batches:
            for name, reason in batch.unreadable:
                warnings.warn(f"Skipped the unreadable image {name}: {reason}", stacklevel=3)
            # A worker's arrays hold a file descriptor each for as long as they live: keep copies.
            yield batch._replace(
                labels=np.array(batch.labels),
                indices=np.array(batch.indices),
                mask=np.array(batch.mask),
            )
