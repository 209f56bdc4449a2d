"""What random views are made of, each on a batch: crop and resize, colours, blur.

A view's parameters come from `views.sample_view`; here they are given.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ur_jax.types import Array

CONTRAST, SATURATION, HUE = 1, 2, 3  # places of the factors of a `Jitter`; 0 is brightness
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L
# Crops and blurs are small matrix products; accelerators would compute them in reduced precision.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Crop(NamedTuple):
    """A box inside an image in whole pixels, int32."""

    top: Array
    left: Array
    height: Array
    width: Array


class Jitter(NamedTuple):
    """Parameters of the colour operations 0 brightness, 1 contrast, 2 saturation, 3 hue.

    `order` (4,), int32, lists the operations as they are applied; `factors` (4,), float32, belong
    to operations 0 to 3, the last being the shift of hue.
    """

    order: Array
    factors: Array


def crop_and_resize(images: Array, crop: Crop, flip: Array, *, size: tuple[int, int]) -> Array:
    """Cuts a box out of each image, resizes it by antialiased bilinear interpolation and flips it.

    Output pixel i of an axis weighs input pixel j inside the box by
    max(0, 1 - |j + 1/2 - c_i| / max(1, s)), normalised, with s = box size / output size and
    c_i = start + (i + 1/2) s: Pillow's rule. Pixels outside the box have no influence.

    Args:
      images: (B, H, W, 3).
      crop: boxes, fields (B,).
      flip: (B,), bool; exchanges left and right.
      size: height and width of the output in pixels.

    Returns:
      (B, *size, 3).
    """
    sample = jax.vmap(_bilinear_weights, (0, 0, 0, None, None))
    unflipped = jnp.zeros_like(flip)
    rows = sample(crop.top, crop.height, unflipped, images.shape[1], size[0])
    columns = sample(crop.left, crop.width, flip, images.shape[2], size[1])
    return _resample(images, rows, columns)


def color_jitter(images: Array, jitter: Jitter) -> Array:
    """Changes brightness, contrast, saturation and hue of each image in its own order.

    The first three are x <- clip(f x + (1 - f) base, 0, 1) with a factor f and as base 0, the
    image's mean grey value, or the pixel's grey value. Hue is shifted in the HSV cylinder.

    Args:
      images: (B, H, W, 3), float32 in [0, 1].
      jitter: fields (B, 4).

    Returns:
      (B, H, W, 3), float32 in [0, 1].
    """
    # Only hue is costly. The other three are cheap enough to be computed for every place in the
    # order, before hue and again after it, and to be neutral where the image has another order.
    order, factors = jitter
    ordered = jnp.take_along_axis(factors, order, axis=-1)
    place_of_hue = jnp.argmax(order == HUE, axis=-1)
    for place in (0, 1, 2):
        factor = jnp.where(place < place_of_hue, ordered[:, place], 1.0)
        images = _blend(images, order[:, place], factor)
    images = jnp.clip(_shift_hue(images, per_image(factors[:, HUE])), 0, 1)
    for place in (1, 2, 3):
        factor = jnp.where(place > place_of_hue, ordered[:, place], 1.0)
        images = _blend(images, order[:, place], factor)
    return images


def grayscale(images: Array) -> Array:
    """Replaces the colours (..., 3) by their grey value 0.299 R + 0.587 G + 0.114 B, repeated."""
    return jnp.broadcast_to(_luma(images), images.shape)


def gaussian_blur(images: Array, sigma: Array, *, radius: int) -> Array:
    """Blurs each image by a sampled Gaussian, exp(-d^2 / (2 sigma^2)) at pixel distance d.

    Beyond the border the nearest pixel is repeated.

    Args:
      images: (B, H, W, 3), H and W >= 2.
      sigma: (B,), standard deviation in pixels, > 0.
      radius: how many pixels beyond the border are counted; 4 sigma neglects 1e-4.

    Returns:
      (B, H, W, 3).
    """
    weights = jax.vmap(_gaussian_weights, (0, None, None))
    rows, columns = (weights(sigma, n, radius) for n in images.shape[1:3])
    return _resample(images, rows, columns)


def solarize(images: Array) -> Array:
    """Inverts values of at least 1/2."""
    return jnp.where(images < 0.5, images, 1 - images)


def per_image(values: Array) -> Array:
    """(B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]


def _luma(images: Array) -> Array:
    """The grey value of each pixel, (..., 3) -> (..., 1)."""
    red, green, blue = (images[..., channel] * _LUMA[channel] for channel in range(3))
    return (red + green + blue)[..., None]


def _blend(images: Array, operation: Array, factor: Array) -> Array:
    """Applies brightness, contrast or saturation, (B,), with a factor (B,) to each image."""
    operation, factor = per_image(operation), per_image(factor)
    grey = _luma(images)
    mean = jnp.mean(grey, axis=(1, 2), keepdims=True)
    base = jnp.where(operation == SATURATION, grey, jnp.where(operation == CONTRAST, mean, 0.0))
    return jnp.clip(factor * images + (1 - factor) * base, 0, 1)


def _shift_hue(images: Array, shift: Array) -> Array:
    """Turns the hue of each pixel (..., 3) by a share of the colour circle.

    In the hexagonal HSV cylinder, whose hue runs from 0 to 6. Colours are compared by size, never
    by equality with the largest (as dm_pix and others do): where a compiler computes a colour twice
    and rounds it in two ways, none is equal to the largest, and the pixel gets another colour. What
    the branches give is the same where two colours are.
    """
    red, green, blue = images[..., :1], images[..., 1:2], images[..., 2:]
    largest = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = largest - jnp.minimum(jnp.minimum(red, green), blue)
    inverse = 1 / jnp.where(chroma > 0, chroma, 1.0)
    hue = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) * inverse,
        jnp.where(green >= blue, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
    )
    ahead = (jnp.array([5.0, 3.0, 1.0]) + hue + 6 * shift) % 6  # red, green, blue
    return largest - chroma * jnp.clip(jnp.minimum(ahead, 4 - ahead), 0, 1)


def _bilinear_weights(start: Array, length: Array, flip: Array, num_in: int, num_out: int) -> Array:
    """The (num_out, num_in) matrix that resizes `length` pixels from `start`, flipped or not."""
    scale = length.astype(jnp.float32) / num_out
    index = jnp.arange(num_out)
    index = jnp.where(flip, num_out - 1 - index, index).astype(jnp.float32)
    centre = start.astype(jnp.float32) + (index + 0.5) * scale
    pixel = jnp.arange(num_in)
    distance = jnp.abs(pixel.astype(jnp.float32) + 0.5 - centre[:, None])
    weights = jnp.maximum(0, 1 - distance / jnp.maximum(1, scale))
    weights = jnp.where((start <= pixel) & (pixel < start + length), weights, 0.0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _gaussian_weights(sigma: Array, num_pixels: int, radius: int) -> Array:
    """The (num_pixels, num_pixels) matrix that blurs one axis and repeats the border's pixels."""
    pixel = jnp.arange(num_pixels, dtype=jnp.float32)
    position = jnp.arange(-radius, num_pixels + radius, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * ((position - pixel[:, None]) / sigma) ** 2)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    # What falls on or beyond a border belongs to the border's pixel.
    first = jnp.sum(weights[:, : radius + 1], axis=-1, keepdims=True)
    last = jnp.sum(weights[:, num_pixels + radius - 1 :], axis=-1, keepdims=True)
    inner = weights[:, radius + 1 : num_pixels + radius - 1]
    return jnp.concatenate([first, inner, last], axis=-1)


def _resample(images: Array, rows: Array, columns: Array) -> Array:
    """Multiplies each image by its row weights (B, i, H) and column weights (B, j, W)."""
    images = _einsum("bih,bhwc->biwc", rows, images)
    return _einsum("bjw,biwc->bijc", columns, images)
