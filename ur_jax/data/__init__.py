"""Images: one spec string, the reference pipeline's exact pixels, batches of one static shape.

    source = open_images("folder:photos")            # or "tfds:cifar10/test", or "demo"
    indices = evenly_spaced(len(source), 1000)
    batches = image_batches(
        source, indices, input_size=(224, 224), preparation="resize", batch_size=64
    )
    next(batches).images                             # (64, 224, 224, 3) float32 in [0, 1]

Pixels are decoded and resized by Pillow alone, on uint8, and divided by 255 at the very end, so
they are the same bytes on every machine. Nothing here downloads anything.
"""

from __future__ import annotations

import os
import re

from ur_jax.data.batches import (
    DecodedImages,
    ImageBatch,
    Unreadable,
    evenly_spaced,
    image_batches,
    image_batches_uint8,
    load_uint8,
)
from ur_jax.data.pixels import (
    PREPARATIONS,
    central_crop,
    prepare,
    resize,
    resize_crop,
    resize_shorter,
)
from ur_jax.data.prepared import TfdsSource
from ur_jax.data.probe_views import PROBE_KINDS, ProbeViews, ViewConfig
from ur_jax.data.shuffled import ShuffledImages
from ur_jax.data.sources import DemoSource, Example, FolderSource, ImageSource
from ur_jax.errors import UserError, unknown_name

__all__ = [
    "PROBE_KINDS",
    "PREPARATIONS",
    "DecodedImages",
    "DemoSource",
    "Example",
    "FolderSource",
    "ImageBatch",
    "ImageSource",
    "ProbeViews",
    "ShuffledImages",
    "TfdsSource",
    "Unreadable",
    "ViewConfig",
    "central_crop",
    "evenly_spaced",
    "image_batches",
    "image_batches_uint8",
    "load_uint8",
    "open_images",
    "prepare",
    "resize",
    "resize_crop",
    "resize_shorter",
]


def open_images(spec: str, *, data_dir: str | os.PathLike[str] | None = None) -> ImageSource:
    """Opens the images that a spec string names.

    Args:
      spec: `tfds:NAME/SPLIT` (NAME may carry a config and version, SPLIT a slice such as
        `train[:10%]`), `folder:PATH`, or `demo`.
      data_dir: for `tfds:` only, where data sets are prepared, or one prepared directory itself;
        by default the environment variable TFDS_DATA_DIR, then tensorflow-datasets' own place.

    Returns:
      The source; reading from it never touches the network.

    Raises:
      ValueError: for a malformed spec, an unknown data set or split, a data set that is not
        prepared, a missing folder or one without images.
    """
    scheme, _, rest = spec.partition(":")
    if spec == "demo":
        return DemoSource()
    if scheme == "folder" and rest:
        return FolderSource(rest)
    if scheme == "tfds":
        match = re.fullmatch(r"(\w+(?:/[\w.+-]+)?(?::[\d.*]+)?)/([^/]+)", rest)
        if match:
            return TfdsSource(*match.groups(), data_dir=data_dir)
    if scheme not in ("demo", "folder", "tfds"):
        raise unknown_name("image spec", spec, ("tfds:NAME/SPLIT", "folder:PATH", "demo"))
    raise UserError(
        f"Malformed image spec {spec!r}: expected tfds:NAME/SPLIT (as in tfds:cifar10/test), "
        "folder:PATH (as in folder:./photos) or demo."
    )
