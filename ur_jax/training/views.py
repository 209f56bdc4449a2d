"""Random training views on the device: crop, colour jitter, grey, blur, solarize, flip.

The operations are those of the two MoCo recipes in floating point, without the rounding to 8 bits
after every step. `sample_view` draws the parameters of one view from one key; `augment` draws
one set per image and applies them to a batch.

References: He et al. 2020 (MoCo), Chen et al. 2020 (MoCo v2) and 2021 (MoCo v3), appendix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.errors import UserError
from ur_jax.types import Array, Key

_NUM_ATTEMPTS = 10
_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # the factors of the operations that change nothing
_CONTRAST, _SATURATION, _HUE = 1, 2, 3
_SWITCHES = ("jitter", "grey", "blur", "solarize", "flip")
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L
# Crops and blurs are small matrix products; accelerators would compute them in reduced precision.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """The distribution of one random view.

    Attributes:
      size: height and width of the view in pixels, each >= 2.
      area: range of the cropped fraction of the image's area, in (0, 1].
      aspect: range of the crop's width / height, log-uniform, > 0.
      brightness, contrast, saturation: factors are uniform in 1 -/+ this, in [0, 1].
      hue: shifts are uniform in -/+ this fraction of the colour circle, in [0, 0.5].
      jitter_probability: how often the four colour operations are applied, in random order.
      grey_probability: how often the view loses its colour.
      blur_probability: how often the view is blurred.
      blur_sigma: range of the Gaussian's standard deviation in pixels of the view, > 0.
      solarize_probability: how often values of at least 1/2 are inverted.
      flip_probability: how often left and right are exchanged.

    Raises:
      ValueError: a field is outside its range.
    """

    size: tuple[int, int] = (224, 224)
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 0.0
    grey_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    flip_probability: float = 0.5

    def __post_init__(self):
        if len(self.size) != 2 or not all(isinstance(n, int) and n >= 2 for n in self.size):
            raise UserError(
                f"Expected size as two integers (height, width) >= 2, got {self.size!r}; "
                "use e.g. (224, 224)."
            )
        for name, limit in (("area", 1.0), ("aspect", math.inf), ("blur_sigma", math.inf)):
            bounds = getattr(self, name)
            ordered = len(bounds) == 2 and 0 < bounds[0] <= bounds[1] <= limit
            if not ordered or math.isinf(bounds[1]):
                raise UserError(
                    f"Expected {name} as (low, high) with 0 < low <= high"
                    f"{' <= 1' if limit == 1 else ''}, got {bounds!r}; order and scale the two."
                )
        for name in (*_OPERATIONS, *(f"{switch}_probability" for switch in _SWITCHES)):
            limit = 0.5 if name == "hue" else 1.0
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(
                    f"Expected {name} in [0, {limit:g}], got {getattr(self, name)!r}; "
                    "0 switches it off."
                )

    def at(self, size: tuple[int, int], *, blur_scale: float = 1.0) -> AugmentConfig:
        """Returns the same recipe for another output size.

        Args:
          size: height and width of the view in pixels.
          blur_scale: factor on `blur_sigma`, > 0. The recipes blur views of 224 x 224 pixels by
              0.1 to 2 pixels; `size[0] / 224` keeps that blur relative to the picture, 1 keeps
              it in pixels.
        """
        low, high = self.blur_sigma
        sigma = (low * blur_scale, high * blur_scale)
        return dataclasses.replace(self, size=size, blur_sigma=sigma)


# The linear probes train on crops and flips alone; the MoCo recipes are those of the papers'
# appendices, at 224 x 224 pixels.
PROBE = AugmentConfig()
# Mild crops and flips: FARE keeps the representations of images as they are used.
FARE = AugmentConfig(area=(0.5, 1.0))
MOCO_V2 = AugmentConfig(
    area=(0.2, 1.0),
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    jitter_probability=0.8,
    grey_probability=0.2,
    blur_probability=0.5,
)
MOCO_V3_VIEW1 = dataclasses.replace(MOCO_V2, area=(0.08, 1.0), saturation=0.2, blur_probability=1.0)
MOCO_V3_VIEW2 = dataclasses.replace(MOCO_V3_VIEW1, blur_probability=0.1, solarize_probability=0.2)


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


class View(NamedTuple):
    """All that is random about one view; `grey` to `flip` are booleans, `sigma` in pixels."""

    crop: Crop
    jitter: Jitter
    grey: Array
    blur: Array
    sigma: Array
    solarize: Array
    flip: Array


def sample_view(key: Key, height: int, width: int, *, config: AugmentConfig) -> View:
    """Draws all parameters of one view.

    The crop: up to ten times, an area fraction a ~ U(area) and a ratio log r ~ U(log aspect) give
    a box of width round(sqrt(a H W r)) and height round(sqrt(a H W / r)); the first that
    fits is placed uniformly. If none fits, the largest central box with a ratio in range is
    taken. Rejecting boxes, not clipping them, makes accepted areas smaller than U(area).

    Args:
      key: a single typed key.
      height, width: size of the image that the view is made from, in pixels.
      config: the view's distribution.

    Returns:
      One view; without colour jitter its factors are 1 and its shift of hue is 0.

    Reference: Szegedy et al. 2015 (arXiv:1409.4842), section 6, for the crop.
    """
    # One draw for everything: each draw adds half a second to the compilation on a CPU.
    sizes = (2 * (_NUM_ATTEMPTS + 1), 2 * len(_OPERATIONS), len(_SWITCHES), 1)
    uniform = jax.random.uniform(key, (sum(sizes),))
    crop, jitter, switches, sigma = jnp.split(uniform, np.cumsum(sizes[:-1]))
    probabilities = jnp.array([getattr(config, f"{name}_probability") for name in _SWITCHES])
    jittered, grey, blur, solarize, flip = switches < probabilities
    order, factors = _jitter(jitter.reshape(2, -1), config)
    low, high = config.blur_sigma
    return View(
        crop=_crop(crop.reshape(2, -1), height, width, config),
        jitter=Jitter(order, jnp.where(jittered, factors, jnp.array(_NEUTRAL))),
        grey=grey,
        blur=blur,
        sigma=low + (high - low) * sigma[0],
        solarize=solarize,
        flip=flip,
    )


def augment(images: Array, key: Key, *, config: AugmentConfig) -> Array:
    """Makes one random view of each image.

    The view of an image depends on the image, its key and `config` alone, so that a batch cut
    into pieces or spread over devices gives the same views. Pure and without host work:
    call it inside the jitted training step.

    Args:
      images: (B, H, W, 3), float32 in [0, 1].
      key: one typed key, from which image i gets `fold_in(key, i)`, or one key per image (B,).
      config: the views' distribution.

    Returns:
      (B, *config.size, 3), float32 in [0, 1].

    Raises:
      ValueError: images or keys of another shape or dtype.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.float32:
        raise UserError(
            f"Expected images (B, H, W, 3) of float32 in [0, 1], got {images.shape} of "
            f"{images.dtype}; divide 8-bit images by 255 and stack them along a first axis."
        )
    batch, height, width, _ = images.shape
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch,)):
        raise UserError(
            f"Expected one typed key or one per image ({batch},), got {key.dtype} of shape "
            f"{key.shape}; make it by jax.random.key(seed)."
        )
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    sample = functools.partial(sample_view, height=height, width=width, config=config)
    return _apply(images, jax.vmap(sample)(key), config)


def _apply(images: Array, view: View, config: AugmentConfig) -> Array:
    """Applies views to a batch in the recipes' order, leaving out what `config` never does."""
    images = crop_and_resize(images, view.crop, view.flip, size=config.size)
    if config.jitter_probability > 0:
        images = color_jitter(images, view.jitter)
    if config.blur_probability > 0:
        radius = math.ceil(4 * config.blur_sigma[1])
        blurred = gaussian_blur(images, view.sigma, radius=radius)
        images = jnp.where(_per_image(view.blur), blurred, images)
    # Grey comes before blur in the recipes. Both are linear and commute; in this order the three
    # channels of a grey view are equal to the last bit.
    if config.grey_probability > 0:
        images = jnp.where(_per_image(view.grey), grayscale(images), images)
    if config.solarize_probability > 0:
        solarized = dm_pix.solarize(images, 0.5)
        images = jnp.where(_per_image(view.solarize), solarized, images)
    return jnp.clip(images, 0, 1)


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
    place_of_hue = jnp.argmax(order == _HUE, axis=-1)
    for place in (0, 1, 2):
        factor = jnp.where(place < place_of_hue, ordered[:, place], 1.0)
        images = _blend(images, order[:, place], factor)
    shift = factors[:, _HUE, None, None]
    with jax.numpy_dtype_promotion("standard"):  # dm_pix adds a boolean to a float
        shifted = dm_pix.adjust_hue(jnp.moveaxis(images, -1, 1), shift, channel_axis=1)
    images = jnp.clip(jnp.moveaxis(shifted, 1, -1), 0, 1)
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


def _crop(uniform: Array, height: int, width: int, config: AugmentConfig) -> Crop:
    """Turns (2, attempts + 1) uniform numbers into a box, the last two being its place."""
    fraction, ratio = uniform[:, :-1]
    low, high = config.area
    area = height * width * (low + (high - low) * fraction)
    low, high = (math.log(bound) for bound in config.aspect)
    ratio = jnp.exp(low + (high - low) * ratio)
    widths = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (0 < widths) & (widths <= width) & (0 < heights) & (heights <= height)

    first, found = jnp.argmax(fits), jnp.any(fits)
    low, high = config.aspect
    box_height = jnp.where(found, heights[first], min(height, round(width / low)))
    box_width = jnp.where(found, widths[first], min(width, round(height * high)))
    free = jnp.stack([height - box_height, width - box_width])
    corner = jnp.floor(uniform[:, -1] * (free + 1).astype(jnp.float32)).astype(jnp.int32)
    top, left = jnp.where(found, corner, free // 2)
    return Crop(top, left, box_height, box_width)


def _jitter(uniform: Array, config: AugmentConfig) -> Jitter:
    """Turns (2, 4) uniform numbers into an order and factors."""
    strengths = jnp.array([getattr(config, name) for name in _OPERATIONS])
    factors = jnp.array(_NEUTRAL) + strengths * (2 * uniform[1] - 1)
    return Jitter(jnp.argsort(uniform[0]).astype(jnp.int32), factors)


def _per_image(values: Array) -> Array:
    """(B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]


def _luma(images: Array) -> Array:
    """The grey value of each pixel, (..., 3) -> (..., 1)."""
    red, green, blue = (images[..., channel] * _LUMA[channel] for channel in range(3))
    return (red + green + blue)[..., None]


def _blend(images: Array, operation: Array, factor: Array) -> Array:
    """Applies brightness, contrast or saturation, (B,), with a factor (B,) to each image."""
    operation, factor = _per_image(operation), _per_image(factor)
    grey = _luma(images)
    mean = jnp.mean(grey, axis=(1, 2), keepdims=True)
    base = jnp.where(operation == _SATURATION, grey, jnp.where(operation == _CONTRAST, mean, 0.0))
    return jnp.clip(factor * images + (1 - factor) * base, 0, 1)


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
