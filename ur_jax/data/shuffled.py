"""Training data: a new random order of the same images in every epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ur_jax.checks import check_type, whole_number
from ur_jax.data.batches import checked_indices, image_batches_uint8, load_uint8
from ur_jax.data.pixels import check_size
from ur_jax.data.sources import ImageSource
from ur_jax.errors import UserError

_IN_MEMORY_BYTES = 2**31


class ShuffledImages:
    """Whole batches of a data set, in an order that depends on the seed and the epoch alone.

    A small data set (2 GiB of pixels at most) is decoded once into memory, a larger one anew in
    every epoch. The last images of an epoch's order, fewer than a batch, are left out. An
    unreadable image is left out or, in a large data set, replaced by a readable one of its batch.

    Attributes:
      batch_size: images in a batch, over all processes.
      steps_per_epoch: batches in an epoch.
      num_images: images that the epochs are made of.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: np.ndarray,
        *,
        input_size: tuple[int, int],
        preparation: str,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        in_memory: bool | None = None,
        process: int = 0,
        num_processes: int = 1,
    ):
        """Decodes a small data set.

        Args:
          source: from `open_images`.
          indices: (N,) positions in the source's listing.
          input_size: (H, W) of the decoded images.
          preparation: see `prepare`.
          batch_size: images in a batch, over all processes.
          seed: of the orders.
          num_workers: processes that decode, as in `image_batches`.
          in_memory: whether to keep the decoded images; by default, if they are small.
          process: number of this process, which gets its share of each batch.
          num_processes: how many there are.

        Raises:
          ValueError: for fewer images than a batch, or a batch that the processes can't divide.
        """
        check_type("source", source, ImageSource)
        indices = checked_indices(source, indices)
        input_size = check_size(input_size, "input_size")
        batch_size = whole_number(batch_size, "batch_size", least=1)
        num_processes = whole_number(num_processes, "num_processes", least=1)
        process, seed = (
            whole_number(process, "process", least=0),
            whole_number(seed, "seed", least=0),
        )
        if process >= num_processes:
            raise UserError(f"Expected process in [0, {num_processes}), got {process}.")
        if batch_size % num_processes:
            raise UserError(
                f"Expected a batch size divisible by {num_processes} processes, got {batch_size}."
            )
        self._source, self._workers, self._seed = source, num_workers, seed
        self._shape = {"input_size": input_size, "preparation": preparation}
        self._process, self._share = process, batch_size // num_processes
        self._indices, self._pixels = indices, None
        if in_memory is None:
            in_memory = len(indices) * input_size[0] * input_size[1] * 3 <= _IN_MEMORY_BYTES
        if in_memory:
            decoded = load_uint8(source, indices, num_workers=num_workers, **self._shape)
            self._pixels, self._indices = decoded.images, decoded.indices
        self.batch_size = batch_size
        self.num_images = len(self._indices)
        self.steps_per_epoch = self.num_images // batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"Expected at least one batch of {batch_size} images, got {self.num_images}; lower "
                "the batch size or give more images."
            )

    def epoch(self, number: int, *, start: int = 0) -> Iterator[np.ndarray]:
        """Yields this process's share (b,H,W,3) uint8 of each batch of an epoch.

        Args:
          number: of the epoch, from 0.
          start: number of leading batches to leave out: a resumed run gives those it has done.
        """
        number = whole_number(number, "the number of an epoch", least=0)
        start = whole_number(start, "start", least=0)
        order = np.random.default_rng([self._seed, number]).permutation(self.num_images)
        whole = order[: self.steps_per_epoch * self.batch_size]
        shares = whole.reshape(self.steps_per_epoch, -1, self._share)[:, self._process]
        if self._pixels is not None:
            yield from (self._pixels[rows] for rows in shares[start:])
            return
        batches = image_batches_uint8(
            self._source, self._indices[shares[start:].ravel()], batch_size=self._share,
            num_workers=self._workers, **self._shape,
        )  # fmt: skip
        for batch in batches:
            readable = np.flatnonzero(batch.mask)
            if not len(readable):
                raise UserError(f"None of the images {batch.names[:3]}, ... could be read.")
            rows = np.where(batch.mask, np.arange(len(batch.mask)), readable[0])
            yield batch.images[rows]
