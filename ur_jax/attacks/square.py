"""Square attack: random search that needs no gradient.

Reference: Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial
attack via random search" (arXiv:1912.00049), algorithms 1 and 2.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.attacks.rules import RULES, better
from ur_jax.types import Array

_HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


class Best(NamedTuple):
    """The best images so far and their objective, (B, ...)."""

    images: Array
    objective: Array


@RULES.register("square")
@dataclasses.dataclass(frozen=True)
class Square:
    """Each step repaints a random square of the best image with eps or -eps in each channel.

    The start is vertical stripes of eps or -eps. A square is kept if the objective has become
    larger. Its area is `share` of the image at first, and halves at shares of the budget: which
    squares are tried depends on `num_steps`, the number of queries. An attack that moves images
    farther than APGD does says that the encoder's gradients mislead.

    Attributes:
      share: of the image's area, the first square's.
    """

    share: float = 0.8
    keeps_best = True
    needs_gradient = False
    norms = ("linf",)

    def start(self, ball, keys):
        """Vertical stripes (B,H,W,3) at the faces of the ball."""
        width = ball.images.shape[2]
        signs = jax.vmap(lambda key: jax.random.rademacher(key, (1, width, 3), jnp.float32))(keys)
        return ball.images + ball.eps * signs

    def init(self, ball, start, step_size, num_steps):
        height, width = ball.images.shape[1:3]
        sides = jnp.asarray(_sides(self.share, height, width, num_steps))
        return sides, Best(start, jnp.full(len(start), jnp.nan))

    def step(self, state, ball, point):
        sides, best = state
        best = better(Best(point.images, point.objective), best)
        side, size = sides[point.number], ball.images.shape[1:3]
        inside, signs = jax.vmap(lambda key: _square(key, side, size))(point.keys)
        painted = ball.images + ball.eps * signs
        return (sides, best), jnp.where(inside, painted, best.images)


def _square(key: Array, side: Array, size: tuple[int, int]) -> tuple[Array, Array]:
    """Where a random square of an image lies (H,W,1), and its sign in each channel (1,1,3)."""
    place, paint = jax.random.split(key)
    corner = jax.random.uniform(place, (2,))
    inside = jnp.ones((1, 1), bool)
    for axis, length in enumerate(size):
        room = (length - side + 1).astype(jnp.float32)
        first = jnp.floor(corner[axis] * room).astype(jnp.int32)
        pixels = jnp.arange(length)
        along = (pixels >= first) & (pixels < first + side)
        inside = inside & jnp.expand_dims(along, 1 - axis)
    return inside[..., None], jax.random.rademacher(paint, (1, 1, 3), jnp.float32)


def _sides(share: float, height: int, width: int, num_steps: int) -> np.ndarray:
    """Side of each query's square (T,), in pixels."""
    at = np.arange(num_steps) * 10_000 / num_steps
    halvings = np.searchsorted(_HALVED_AT, at, side="left")
    sides = np.round(np.sqrt(share * height * width / 2.0**halvings))
    return np.clip(sides, 1, min(height, width)).astype(np.int32)
