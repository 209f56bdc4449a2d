"""How fast images are decoded, and read from a cache: images per second of a core.

    python -m ur_jax.performance.feeding --images folder:photos --input-size 224 224

Three passes over the same images, as every job makes them: from the source, from the source into
a new cache (`--image-cache`), from that cache. A rate is over processor seconds, which other
programs disturb less than the clock; what is waited for, a disk say, shows in the clock alone.
With `--device-rate 16000` two more: how much of the time a device that takes so many images per
second computes in a job, if it must wait for nothing but its images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ur_jax import data, runs
from ur_jax.data import CachedImages, ImageBatch, ImageSource
from ur_jax.errors import UserError
from ur_jax.jobs import parts
from ur_jax.jobs.base import Session


class Rate(NamedTuple):
    """Images per second of a core's time, and of the clock."""

    core: float
    clock: float


def rate(
    source: ImageSource,
    *,
    input_size: tuple[int, int],
    preparation: str = "resize",
    num_images: int | None = None,
    batch_size: int = 256,
) -> Rate:
    """Loads images once, in threads of this process.

    Args:
      source: the images.
      input_size, preparation: see `data.prepare`.
      num_images: evenly spaced ones; all by default.
      batch_size: images per batch.
    """
    indices = data.evenly_spaced(len(source), num_images or len(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unreadable images
        began, worked = time.perf_counter(), time.process_time()
        for _ in data.image_batches_uint8(
            source, indices, input_size=input_size, preparation=preparation, batch_size=batch_size
        ):
            pass
        worked, seconds = time.process_time() - worked, time.perf_counter() - began
    return Rate(len(indices) / worked, len(indices) / seconds)


class _Begun:
    """What a device computes, as an array that is waited for."""

    def __init__(self, ends: Future[np.ndarray]):
        self._ends = ends

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._ends.result()


def busy(
    source: ImageSource,
    *,
    device_rate: float,
    input_size: tuple[int, int],
    preparation: str = "resize",
    num_images: int | None = None,
    batch_size: int = 256,
) -> float:
    """Share of the time in which an emulated device computes, between its first batch and its last.

    A stage of a job as it is: images are loaded, and results written, while the device, which is a
    thread that sleeps, has one batch after the other.

    Args:
      source: the images.
      device_rate: images per second of the device, > 0.
      input_size, preparation: see `data.prepare`.
      num_images: evenly spaced ones; all by default.
      batch_size: images per batch.

    Raises:
      UserError: for a rate that is not positive, or a single batch, before which nothing waits.
    """
    if not device_rate > 0:
        raise UserError(f"Expected a device_rate > 0 images/s, got {device_rate}.")
    indices = data.evenly_spaced(len(source), num_images or len(source))
    if len(indices) <= batch_size:
        raise UserError(
            f"Expected more images than one batch of {batch_size}, got {len(indices)}: a device "
            "waits between batches."
        )
    spans = []

    def computed(images: np.ndarray) -> np.ndarray:
        """The device's work on a batch."""
        began = time.perf_counter()
        time.sleep(len(images) / device_rate)
        spans.append((began, time.perf_counter()))
        return images[:, 0, :, 0]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as device:

        def compute(batch: ImageBatch) -> dict[str, _Begun]:
            """Hands a batch to the device and does not wait."""
            return {"row": _Begun(device.submit(computed, batch.images))}

        parts.run_stage(
            Session(runs.open_run(Path(folder) / "run", {})),
            parts.Stage("rows", "rows", (indices,), batch_size),
            source,
            compute,
            input_size=input_size,
            preparation=preparation,
        )
    return sum(end - began for began, end in spans) / (spans[-1][1] - spans[0][0])


def main() -> None:
    """Prints the rates."""
    parser = argparse.ArgumentParser(
        prog="python -m ur_jax.performance.feeding", description=__doc__
    )
    parser.add_argument("--images", default="demo")
    parser.add_argument("--input-size", nargs=2, type=int, default=(224, 224))
    parser.add_argument("--preparation", default="resize")
    parser.add_argument("--num-images", type=int)
    parser.add_argument("--device-rate", type=float)
    args = parser.parse_args()
    began = time.perf_counter()
    source = data.open_images(args.images)
    listed = time.perf_counter() - began
    print(f"listing {len(source)} images: {listed:.2f} s")
    began = time.perf_counter()
    content = source.content_hash
    print(f"their content hash {content}: {time.perf_counter() - began:.2f} s")
    how = {"input_size": tuple(args.input_size), "preparation": args.preparation,
           "num_images": args.num_images}  # fmt: skip
    rate(source, **{**how, "num_images": 1})  # imports
    with tempfile.TemporaryDirectory() as folder:
        kept = CachedImages(source, folder)
        plain, written, read = (rate(each, **how) for each in (source, kept, kept))
        if args.device_rate is not None:
            for name, each in (("decoded", source), ("from a cache", kept)):
                try:
                    share = busy(each, device_rate=args.device_rate, **how)
                except UserError as error:
                    parser.error(str(error))
                print(f"{name}: a device of {args.device_rate:g} images/s computes {share:.0%}")
    for name, found in (("decoded", plain), ("into a cache", written), ("from it", read)):
        print(
            f"{name}: {found.core:.0f} images/s per core ({found.core / plain.core:.2f} of the "
            f"first), {found.clock:.0f} by the clock"
        )


if __name__ == "__main__":
    main()
