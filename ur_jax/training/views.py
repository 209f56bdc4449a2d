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

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.errors import UserError
from ur_jax.training.operations import (
    Crop,
    Jitter,
    color_jitter,
    crop_and_resize,
    gaussian_blur,
    grayscale,
    per_image,
    solarize,
)
from ur_jax.typed import check_types
from ur_jax.types import Array, Key

_NUM_ATTEMPTS = 10
_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # the factors of the operations that change nothing
_SWITCHES = ("jitter", "grey", "blur", "solarize", "flip")


_NOISE = 0x4015E
"""The stream of a view's noise, apart from that of its other parameters."""


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
      noise: standard deviation of Gaussian noise on the finished view, before it is clipped to
        [0,1], in [0, 1].

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
    noise: float = 0.0

    def __post_init__(self):
        check_types(self)
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
        for name in (*_OPERATIONS, *(f"{s}_probability" for s in _SWITCHES), "noise"):
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
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch,)):
        raise UserError(
            f"Expected one typed key or one per image ({batch},), got {key.dtype} of shape "
            f"{key.shape}; make it by jax.random.key(seed)."
        )
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    sample = functools.partial(sample_view, height=height, width=width, config=config)
    views = _apply(images, jax.vmap(sample)(key), config)
    if config.noise > 0:
        own = jax.vmap(jax.random.fold_in, (0, None))(key, _NOISE)
        draw = lambda key: jax.random.normal(key, views.shape[1:])
        views = jnp.clip(views + config.noise * jax.vmap(draw)(own), 0, 1)
    return views


def _apply(images: Array, view: View, config: AugmentConfig) -> Array:
    """Applies views to a batch in the recipes' order, leaving out what `config` never does."""
    images = crop_and_resize(images, view.crop, view.flip, size=config.size)
    if config.jitter_probability > 0:
        images = color_jitter(images, view.jitter)
    if config.blur_probability > 0:
        radius = math.ceil(4 * config.blur_sigma[1])
        blurred = gaussian_blur(images, view.sigma, radius=radius)
        images = jnp.where(per_image(view.blur), blurred, images)
    # Grey comes before blur in the recipes. Both are linear and commute; in this order the three
    # channels of a grey view are equal to the last bit.
    if config.grey_probability > 0:
        images = jnp.where(per_image(view.grey), grayscale(images), images)
    if config.solarize_probability > 0:
        images = jnp.where(per_image(view.solarize), solarize(images), images)
    return jnp.clip(images, 0, 1)


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
