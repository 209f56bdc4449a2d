"""Images that are in memory: an array, a list of pictures, a `datasets.Dataset`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ur_jax.data.pixels import as_rgb
from ur_jax.data.sources import Example, ImageSource, open_images
from ur_jax.errors import UserError, shown


class ArrayImages(ImageSource):
    """Images of one array.

    Args:
      images: [N,H,W,3], uint8, or floats in [0,1], which become the 8-bit picture that
        round(255 x) is, as every image from a file is one. A torch tensor may be [N,3,H,W].
      labels: [N] integers >= 0, if there are any.

    Raises:
      UserError: for another shape, dtype or range, or labels that are not as many.
    """

    spec = "array"

    def __init__(self, images: Any, labels: Sequence[int] | None = None):
        pixels = _array(images)
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or not len(pixels):
            raise UserError(
                f"Expected images [N,H,W,3] as one array, got shape {pixels.shape}; a single image "
                "is images[None]."
            )
        self.pixels = _as_uint8(pixels)
        self.labels = None if labels is None else np.asarray(labels)
        if self.labels is not None:
            kind = self.labels.dtype.kind
            if self.labels.shape != (len(pixels),) or kind not in "iu" or self.labels.min() < 0:
                raise UserError(
                    f"Expected {len(pixels)} integers >= 0 as labels, got {shown(labels)}."
                )
            self.class_names = tuple(str(i) for i in range(int(self.labels.max()) + 1))

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"{index:06d}"

    def label(self, index: int) -> int:
        return -1 if self.labels is None else int(self.labels[index])

    def __getitem__(self, index: int) -> Example:
        return Example(Image.fromarray(self.pixels[index]), self.label(index), self.name(index))

    @functools.cached_property
    def content_hash(self) -> str:
        """16 hex digits over the pixels and labels."""
        digest = hashlib.sha256(f"{self.pixels.shape} {self.class_names}".encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        digest.update(b"" if self.labels is None else self.labels.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]


class PictureImages(ImageSource):
    """A sequence of Pillow's images, of any sizes and modes, or the rows of a `datasets.Dataset`.

    Args:
      pictures: Pillow's images; or rows, dicts with an "image" and, if there is one, a "label".
      class_names: the names of labels 0, 1, ..., where there are labels.
    """

    spec = "pictures"

    def __init__(self, pictures: Any, class_names: Sequence[str] = ()):
        self.pictures, self.class_names = pictures, tuple(class_names)

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return f"{index:06d}"

    def __getitem__(self, index: int) -> Example:
        found = self.pictures[index]
        label = -1
        if isinstance(found, dict):
            label = int(found.get("label", -1)) if self.class_names else -1
            found = found["image"]
        if not isinstance(found, Image.Image):
            raise TypeError(f"expected a picture, got {type(found).__name__}")
        return Example(as_rgb(found), label, self.name(index))


def as_source(images: Any) -> ImageSource:
    """The source of images, however they are given.

    Args:
      images: a source; a spec such as "folder:photos"; an array (NumPy's, JAX's, torch's); a list
        of such arrays or of Pillow's images; or a `datasets.Dataset` with a column "image".

    Raises:
      UserError: for anything else, and as `open_images`.
    """
    if isinstance(images, ImageSource):
        return images
    if isinstance(images, str):
        return open_images(images)
    if hasattr(images, "shape") and hasattr(images, "dtype"):
        return ArrayImages(images)
    features = getattr(images, "features", None)
    if features is not None and hasattr(images, "__getitem__"):
        if "image" not in features:
            raise UserError(
                f"Expected a data set with a column 'image', got {', '.join(features)}: rename the "
                "one with the images (rename_column)."
            )
        return PictureImages(images, getattr(features.get("label"), "names", None) or ())
    if isinstance(images, list | tuple) and images:
        if all(isinstance(each, Image.Image) for each in images):
            return PictureImages(images)
        if all(hasattr(each, "shape") for each in images):
            shapes = {tuple(each.shape) for each in images}
            if len(shapes) == 1:
                return ArrayImages(np.stack([_array(each) for each in images]))
            raise UserError(f"Expected arrays of one shape, got {shown(sorted(shapes))}.")
    raise UserError(
        "Expected images as a spec such as 'folder:./photos', an array [N,H,W,3], a list of "
        f"Pillow's images or a data set with a column 'image', got {shown(images)}."
    )


def _array(images: Any) -> np.ndarray:
    """As NumPy's, with the channels last."""
    if type(images).__module__.partition(".")[0] == "torch":
        images = images.detach().cpu().numpy()
        if images.ndim >= 3 and images.shape[-3] == 3 and images.shape[-1] != 3:
            images = np.moveaxis(images, -3, -1)
    return np.asarray(images)


def _as_uint8(pixels: np.ndarray) -> np.ndarray:
    """The 8-bit pictures."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind != "f" and pixels.dtype.name != "bfloat16":
        raise UserError(f"Expected uint8 or floats in [0,1] as images, got {pixels.dtype}.")
    pixels = pixels.astype(np.float32)
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0.0 and high <= 1.0):  # also of NaN
        raise UserError(
            f"Expected images in [0,1], got {low:g} to {high:g}; normalisation is part of the "
            "encoder, and pixels of 0 to 255 are uint8."
        )
    return np.rint(pixels * np.float32(255)).astype(np.uint8)
