"""The ball around the originals: where an attack starts in it, and how it stays inside."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping

from ur_jax.checks import check_finite_array, check_key, check_number, check_pixels
from ur_jax.errors import UserError, unknown_name
from ur_jax.types import AnyArray, Array, Images, Keys, OnDevice, PerImage

NORMS = ("linf", "l2", "l1")
UNIT = "pixel units of [0,1]"
SPARSE = 0.01
"""Share of the pixels that a step in l1 moves, unless its rule says otherwise."""

# The float32 norm of a perturbation is off by less than this share of itself.
_NORM_MARGIN = 2.0**-18
_HALVINGS = 32  # of the threshold of an l1 projection


@dataclasses.dataclass(frozen=True)
class Ball:
    """The images at most `eps` from each of some originals, in a norm, and in [0,1].

    Attributes:
      images: the originals (B,H,W,3) float32 in [0,1].
      eps: radius, > 0, in pixel units.
      norm: one of `NORMS`.
      mask: (B,H,W,1) bool, the pixels that may change; None for all.
    """

    images: AnyArray
    eps: float | Array
    norm: str
    mask: Array | None = None

    def project(self, attacked: AnyArray) -> Array:
        """Moves images (B,H,W,3) into the ball and into [0,1]; see `project`."""
        if self.mask is not None:
            attacked = jnp.where(self.mask, attacked, self.images)
        return _project(attacked, self.images, self.eps, self.norm)

    def direction(self, gradient: Array, share: float | Array = SPARSE) -> Array:
        """Ascent direction (B,H,W,3) of unit length in the norm; 0 for a gradient of 0.

        That of steepest ascent in linf and l2. In l1 that would be a single pixel, often one that
        has no room left: the step is divided equally among the share of the pixels with the largest
        gradients (Tramer & Boneh 2019, appendix A).

        Args:
          gradient: (B,H,W,3).
          share: of the pixels' values that move, in (0, 1], of all images or of each (B,); l1 only.
        """
        if self.mask is not None:
            gradient = jnp.where(self.mask, gradient, 0.0)
        if self.norm == "linf":
            return jnp.sign(gradient)
        if self.norm == "l1":
            return _sparse(gradient, share)
        # Scaled first: squares of small gradients would underflow.
        largest = jnp.max(jnp.abs(gradient), axis=(1, 2, 3), keepdims=True)
        gradient = gradient / jnp.where(largest > 0, largest, 1.0)
        length = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=(1, 2, 3), keepdims=True))
        return gradient / jnp.maximum(length, 1.0)

    def draw(self, keys: Array) -> Array:
        """Images uniform in the ball, one for each key (B,), then moved into [0,1]."""
        shape = self.images.shape[1:]
        if self.norm == "linf":
            draw = lambda key: jax.random.uniform(key, shape, minval=-1.0)
        else:
            p = 2 if self.norm == "l2" else 1
            draw = lambda key: jax.random.ball(key, self.images[0].size, p).reshape(shape)
        return self.project(self.images + self.eps * jax.vmap(draw)(keys))


def project(attacked: Images, images: Images, *, eps: float | Array, norm: str) -> OnDevice:
    """Moves `attacked` into the ball of radius `eps` around `images`, and into [0,1].

    linf: clips every pixel to [x - eps, x + eps], then to [0,1]. l2: scales the perturbation to
    eps / max(eps, |delta|_2), clips to [0,1] (which brings it no farther from x, since x is in
    [0,1]) and rounds every pixel towards x, so that rounding can't leave the ball either. l1: the
    nearest point of ball and box together, x + sign(delta) clip(|delta| - t, 0, room), where room
    is what a pixel has left in that direction and t >= 0 the smallest with |.|_1 <= eps, by
    bisection (Croce & Hein 2021, "Mind the Box"); then scaled and rounded as in l2.

    Args:
      attacked: (B,H,W,3) float32, any finite values.
      images: (B,H,W,3) float32 in [0,1], the centres.
      eps: radius, > 0, in pixel units.
      norm: one of `NORMS`.

    Raises:
      UserError: for images that are not in [0,1], `attacked` of another shape or not finite, or a
        radius or norm that is none.
    """
    check_pixels(images)
    check_finite_array("attacked", attacked, images.shape)
    check_norm(norm)
    ball = Ball(images, eps, norm)
    if not isinstance(eps, jax.Array):
        check_number(ball, "eps", above=0.0, unit=UNIT)
    return ball.project(attacked)


def check_norm(norm: str) -> None:
    """Raises UserError, with near names, unless `norm` is one of `NORMS`."""
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)


def _project(attacked: AnyArray, images: AnyArray, eps: float | Array, norm: str) -> Array:
    """`project` without the checks."""
    if norm == "linf":
        return jnp.clip(attacked, jnp.maximum(images - eps, 0.0), jnp.minimum(images + eps, 1.0))
    delta = attacked - images
    if norm == "l1":
        delta = _to_l1_ball(delta, images, eps)
        length = jnp.sum(jnp.abs(delta), axis=(1, 2, 3), keepdims=True)
    else:
        length = jnp.sqrt(jnp.sum(jnp.square(delta), axis=(1, 2, 3), keepdims=True))
    delta = delta * (eps / jnp.maximum(length * (1.0 + _NORM_MARGIN), eps))
    moved = jnp.clip(images + delta, 0.0, 1.0)
    return jnp.where(jnp.abs(moved - images) > jnp.abs(delta), jnp.nextafter(moved, images), moved)


def _to_l1_ball(delta: AnyArray, images: AnyArray, eps: float | Array) -> Array:
    """The perturbations nearest to `delta` in the l1 ball that keep images in [0,1]."""
    axes = (1, 2, 3)
    size, room = jnp.abs(delta), jnp.where(delta > 0, 1.0 - images, images)
    shrunk = lambda threshold: jnp.clip(size - threshold, 0.0, room)
    largest = jnp.max(size, axis=axes, keepdims=True)
    is_outside = jnp.sum(shrunk(0.0), axis=axes, keepdims=True) > eps

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        outside = jnp.sum(shrunk(middle), axis=axes, keepdims=True) > eps
        return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

    _, high = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(largest), largest))
    return jnp.sign(delta) * shrunk(jnp.where(is_outside, high, 0.0))


def _sparse(gradient: Array, share: float | Array) -> Array:
    """The signs of the largest entries of each gradient, of unit length in l1."""
    flat = jnp.abs(gradient).reshape(len(gradient), -1)
    number = jnp.clip(jnp.round(share * flat.shape[1]), 1, flat.shape[1]).astype(jnp.int32)
    place = jnp.broadcast_to(number - 1, (len(flat),))[:, None]
    least = jnp.take_along_axis(jnp.sort(flat, axis=1, descending=True), place, axis=1)
    signs = jnp.where(jnp.abs(gradient) >= least.reshape(-1, 1, 1, 1), jnp.sign(gradient), 0.0)
    return signs / jnp.maximum(jnp.sum(jnp.abs(signs), axis=(1, 2, 3), keepdims=True), 1.0)


def image_keys(key: Keys, num_images: int) -> jaxtyping.Key[Array, " batch"]:
    """Returns a key per image: `key` folded with 0, 1, ..., or `key` itself if it is (B,) keys."""
    check_key(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_images))
    if key.shape != (num_images,):
        raise UserError(
            f"Expected one key, or one for each of {num_images} images, got {key.shape}."
        )
    return key


def norms(delta: Images) -> tuple[PerImage, PerImage, PerImage]:
    """l1, l2 and linf norms (B,) of perturbations (B,H,W,3)."""
    axes = (1, 2, 3)
    size = jnp.abs(delta)
    return size.sum(axes), jnp.sqrt(jnp.square(delta).sum(axes)), size.max(axes)
