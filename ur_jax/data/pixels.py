"""From an image file to an encoder's uint8 pixels, byte for byte as the reference pipeline."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ur_jax.checks import check_type, whole_number
from ur_jax.encoders.preparation import NAMED, parse_preparation
from ur_jax.errors import UserError, shown

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of a TIFF
_LARGEST_SIDE = 65_535  # of a JPEG
PREPARATIONS = NAMED


def decode(file: BinaryIO) -> Image.Image:
    """Decodes a whole image file to 8-bit RGB, as torchvision and transformers do.

    | in the file | here |
    | --- | --- |
    | grey, grey with alpha, 1 bit | the three channels equal |
    | palette | its colours; transparency is dropped |
    | alpha | dropped: the colours below it show, also where they are transparent |
    | CMYK, YCbCr | Pillow's conversion, without colour profiles |
    | 16 bits per colour channel | the upper 8 |
    | EXIF orientation | ignored: pixels stay as they are stored |
    | several frames or pages | the first |

    Two kinds lose their picture in that conversion, which clips at 255. Ours differ from it:

    | in the file | here |
    | --- | --- |
    | 16-bit grey | scikit-image's `img_as_ubyte`: the upper 8 bits, or as it is if all are <= 255 |
    | 32-bit, floating point; 12-bit or inverted 16-bit TIFF | refused: which value is white? |

    Raises:
      UserError: for a file in no format that Pillow reads, or of the last kind.
    """
    try:
        with Image.open(file) as image:
            return as_rgb(image)
    except UnidentifiedImageError:  # its own message names an object's address, new in every run
        raise UserError("not an image in a format that Pillow reads") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """An open image as 8-bit RGB, see `decode`."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _eight_bits(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image as an 8-bit one."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits, inverted = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC, 1) == 0
    # Pillow reads a grey PGM of more than 8 bits as 32-bit integers, scaled to 65535.
    has_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if not has_16_bits or bits != 16 or inverted:
        raise UserError(
            f"grey pixels of Pillow's mode {image.mode!r}, {bits} bits"
            f"{', white as 0' * inverted}: which value is white is not known; convert the file to "
            "8 bits per channel"
        )
    values = np.asarray(image)
    return Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))


def resize(image: Image.Image, size: tuple[int, int], filter: str = "bilinear") -> Image.Image:
    """Resizes to size = (H, W) by a filter of Pillow's; the aspect ratio is not kept."""
    check_image(image)
    height, width = check_size(size)
    kind = Image.Resampling[filter.upper()]
    # One call per axis, width first: Pillow 13 would choose another order for some tall images.
    return image.resize((width, image.height), kind).resize((width, height), kind)


def resize_shorter(image: Image.Image, shorter: int, filter: str = "bilinear") -> Image.Image:
    """Resizes the shorter side to `shorter` and the longer one to int(shorter * longer / its old).

    Raises:
      ValueError: the image is so elongated that the result would pass Pillow's limit on pixels.
    """
    check_image(image)
    if whole_number(shorter, "shorter") < 1:
        raise UserError(f"Expected shorter >= 1, got {shorter}.")
    longer = int(shorter * max(image.size) / min(image.size))
    if Image.MAX_IMAGE_PIXELS and shorter * longer > Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f"Expected an image that stays below {Image.MAX_IMAGE_PIXELS} pixels when its shorter "
            f"side becomes {shorter}, got {image.width}x{image.height}; crop it beforehand."
        )
    size = (longer, shorter) if image.height > image.width else (shorter, longer)
    return resize(image, size, filter)


def central_crop(image: Image.Image, size: tuple[int, int], *, floor: bool = False) -> Image.Image:
    """Cuts out the central (H, W); an odd margin is split by rounding half to even, or down."""
    check_image(image)
    height, width = check_size(size)
    split = (lambda margin: margin // 2) if floor else (lambda margin: round(margin / 2))
    top, left = split(image.height - height), split(image.width - width)
    return image.crop((left, top, left + width, top + height))


def resize_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes the shorter side to 256/224 of max(H, W), rounded, and takes the central (H, W)."""
    return central_crop(resize_shorter(image, round(max(check_size(size)) * 256 / 224)), size)


def check_image(image: Image.Image) -> None:
    """Raises UserError for something else than a Pillow image that has pixels."""
    check_type("image", image, Image.Image)
    if not min(image.size):
        raise UserError(f"Expected an image with pixels, got {image.width}x{image.height}.")


def check_size(size: tuple[int, int], what: str = "size") -> tuple[int, int]:
    """Returns a size (height, width); raises UserError unless it is two integers of 1 or more."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise UserError(f"Expected {what} as (height, width), got {shown(size)}.")
    height, width = (whole_number(side, f"each side of {what}") for side in size)
    if not 1 <= min(height, width) <= max(height, width) <= _LARGEST_SIDE:
        raise UserError(
            f"Expected {what} as positive (height, width), at most {_LARGEST_SIDE}, got {size}."
        )
    return height, width


def check_preparation(preparation: str) -> None:
    """Raises UserError for a preparation that there is not."""
    parse_preparation(preparation)


def prepare(image: Image.Image, *, input_size: tuple[int, int], preparation: str) -> np.ndarray:
    """Brings an RGB image to an encoder's input size as the reference pipeline does.

    Args:
      image: an RGB image of any size.
      input_size: (H, W).
      preparation: "resize", "resize_crop" (shorter side to 256/224 of the input, central crop), or
        another of `ur_jax.encoders.preparation`.

    Returns:
      (H, W, 3) uint8; the encoder's pixels are these / 255.
    """
    kind = parse_preparation(preparation)
    if kind.shorter is None:
        return np.asarray(resize(image, input_size, kind.filter))
    if kind.shorter == 0:
        return np.asarray(resize_crop(image, input_size))
    if kind.shorter < max(input_size):
        raise UserError(
            f"Expected a shorter side of at least the input's {max(input_size)} pixels before the "
            f"crop, got the preparation {preparation!r}."
        )
    resized = resize_shorter(image, kind.shorter, kind.filter)
    return np.asarray(central_crop(resized, input_size, floor=kind.floor))
