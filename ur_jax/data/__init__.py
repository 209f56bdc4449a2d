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

from ur_jax.data.batches import (
    DecodedImages,
    ImageBatch,
    Unreadable,
    check_batch_size,
    check_workers,
    evenly_spaced,
    image_batches,
    image_batches_uint8,
    load_uint8,
)
from ur_jax.data.cached import CachedImages
from ur_jax.data.corruptions import CORRUPTIONS, Corruption, ViewConfig, corruption
from ur_jax.data.demo import DemoSource
from ur_jax.data.folder import FolderSource
from ur_jax.data.live import ArrayImages, PictureImages, as_source
from ur_jax.data.pixels import (
    PREPARATIONS,
    central_crop,
    prepare,
    resize,
    resize_crop,
    resize_shorter,
)
from ur_jax.data.prepared import TfdsSource
from ur_jax.data.probe_views import ProbeViews
from ur_jax.data.reading import CorruptionError, StorageError
from ur_jax.data.shuffled import ShuffledImages
from ur_jax.data.sources import SOURCES, Example, ImageSource, open_images

__all__ = [
    "ArrayImages",
    "CORRUPTIONS",
    "CachedImages",
    "PREPARATIONS",
    "SOURCES",
    "Corruption",
    "CorruptionError",
    "DecodedImages",
    "DemoSource",
    "Example",
    "FolderSource",
    "ImageBatch",
    "ImageSource",
    "PictureImages",
    "ProbeViews",
    "ShuffledImages",
    "StorageError",
    "TfdsSource",
    "Unreadable",
    "ViewConfig",
    "as_source",
    "central_crop",
    "check_batch_size",
    "check_workers",
    "corruption",
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
