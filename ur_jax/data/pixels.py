"""From an image file to an encoder's uint8 pixels, byte for byte as the reference pipeline."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ur_jax.errors import UserError, unknown_name

PREPARATIONS = ("resize", "resize_crop")


def decode(file: BinaryIO) -> Image.Image:
    """Decodes a whole image file to RGB."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:  # its own message names an object's address, new in every run
        raise UserError("not an image in a format that Pillow reads") from None


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes to size = (H, W) by Pillow's bilinear filter; the aspect ratio is not kept."""
    height, width = size
    # One call per axis, width first: Pillow 13 would choose another order for some tall images.
    return image.resize((width, image.height), Image.Resampling.BILINEAR).resize(
        (width, height), Image.Resampling.BILINEAR
    )


def resize_shorter(image: Image.Image, shorter: int) -> Image.Image:
    """Resizes the shorter side to `shorter` and the longer one to int(shorter * longer / its old).

    Raises:
      ValueError: the image is so elongated that the result would pass Pillow's limit on pixels.
    """
    longer = int(shorter * max(image.size) / min(image.size))
    if Image.MAX_IMAGE_PIXELS and shorter * longer > Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f"Expected an image that stays below {Image.MAX_IMAGE_PIXELS} pixels when its shorter "
            f"side becomes {shorter}, got {image.width}x{image.height}; crop it beforehand."
        )
    return resize(image, (longer, shorter) if image.height > image.width else (shorter, longer))


def central_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cuts out the central (H, W); an odd margin is split by rounding half to even."""
    height, width = size
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def resize_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes the shorter side to 256/224 of max(H, W), rounded, and takes the central (H, W)."""
    return central_crop(resize_shorter(image, round(max(size) * 256 / 224)), size)


def prepare(image: Image.Image, *, input_size: tuple[int, int], preparation: str) -> np.ndarray:
    """Brings an RGB image to an encoder's input size as the reference pipeline does.

    Args:
      image: an RGB image of any size.
      input_size: (H, W).
      preparation: "resize", or "resize_crop" (shorter side to 256/224 of the input, central crop).

    Returns:
      (H, W, 3) uint8; the encoder's pixels are these / 255.
    """
    if preparation not in PREPARATIONS:
        raise unknown_name("preparation", preparation, PREPARATIONS)
    return np.asarray((resize if preparation == "resize" else resize_crop)(image, input_size))
