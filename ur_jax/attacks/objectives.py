"""What an attack maximises, by name: `AttackConfig.objective`, `--objective`.

    @OBJECTIVES.register("l1")              # in one's own file, for --plugin FILE.py --objective l1
    @dataclasses.dataclass(frozen=True)
    class L1:
        def __call__(self, representations, aim):
            difference = representations - aim.reference
            return aim.sign * jnp.abs(difference).sum(-1)

An objective is a pure function of representations (B,D) and what they are compared with, one number
for each image, differentiable almost everywhere. A loss that is none of representations goes to
`loss_pgd` instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ur_jax import distances
from ur_jax.errors import UserError
from ur_jax.registry import Registry
from ur_jax.types import Array


class Aim(NamedTuple):
    """What representations are moved away from, or towards.

    Attributes:
      reference: (B,D), the clean representations, or the targets.
      is_targeted: whether they are targets.
      bank: (N,D) clean representations of other images, for objectives that look at neighbours.
    """

    reference: Array
    is_targeted: bool
    bank: Array | None = None

    @property
    def sign(self) -> float:
        """Of a distance: 1 away from the clean representation, -1 towards a target."""
        return -1.0 if self.is_targeted else 1.0


class Objective(Protocol):
    """What an objective has; made anew, without arguments, by what is registered under its name.

    It may also have `needs_bank = True`, if it looks at neighbours.
    """

    def __call__(self, representations: Array, aim: Aim) -> Array:
        """What is to grow (B,) float32, of representations (B,D) float32."""
        ...


OBJECTIVES: Registry[Callable[[], Objective]] = Registry("objective", "ur_jax.objectives")
"""Every objective, by the name that `AttackConfig.objective` takes."""


@OBJECTIVES.register("l2")
@dataclasses.dataclass(frozen=True)
class L2:
    """Squared l2 distance, which has the direction of gradient of l2 and is smooth at 0."""

    def __call__(self, representations, aim):
        return aim.sign * jnp.sum(jnp.square(representations - aim.reference), axis=-1)


@OBJECTIVES.register("cosine")
@dataclasses.dataclass(frozen=True)
class Cosine:
    """1 - cosine, for encoders whose users compare directions."""

    def __call__(self, representations, aim):
        return aim.sign * distances.distance(representations, aim.reference, divergence="cosine")


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """Pushes the own clean representation behind the k-th neighbour of a bank.

        |z - f(x)|^2 - (k-th smallest of |z - b|^2 over the bank without x itself)

    It is positive where k images of the bank are nearer than the own one, so that nearest-neighbour
    accuracy, top k, fails. Rows of the bank at the own clean representation, to float32 rounding,
    are taken for x itself.

    Attributes:
      k: of the neighbour, >= 1.
    """

    k: int = 1
    needs_bank = True

    def __call__(self, representations, aim):
        if aim.is_targeted:
            raise UserError("Expected no target with the objective of neighbours; leave it out.")
        if len(aim.bank) < self.k + 1:
            raise UserError(
                f"Expected a bank of more than k={self.k} images for the objective of neighbours, "
                f"got {len(aim.bank)}."
            )
        own = jnp.sum(jnp.square(representations - aim.reference), axis=-1)
        away = _squares(representations, aim.bank)
        clean = _squares(aim.reference, aim.bank)
        is_own = clean <= 1e-6 * jnp.max(clean, axis=1, keepdims=True)
        nearest, _ = jax.lax.top_k(-jnp.where(is_own, jnp.inf, away), self.k)
        return own + nearest[:, -1]


def _squares(a: Any, b: Any) -> Array:
    """Squared l2 distances (B,N), with a gradient in `a`."""
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(a**2, axis=-1)[:, None] + jnp.sum(b**2, axis=-1)[None] - 2.0 * product
    return jnp.maximum(squares, 0.0)


OBJECTIVES.register("neighbour", Neighbour)


@OBJECTIVES.register("neighbour-5")
def _fifth_neighbour() -> Neighbour:
    """The counterpart of top-5 accuracy."""
    return Neighbour(5)
