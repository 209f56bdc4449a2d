"""Step rules: how the gradient at a point becomes the next one. A rule is `init` and `step`, pure.

    @RULES.register("heavy_ball")              # in one's own file, for --plugin FILE.py --rule ...
    @dataclasses.dataclass(frozen=True)
    class HeavyBall:
        decay: float = 0.75
        keeps_best = False

        def init(self, ball, start, step_size, num_steps):
            return step_size, jnp.zeros_like(start)

        def step(self, state, ball, point):
            step_size, velocity = state
            velocity = self.decay * velocity + ball.direction(point.gradient)
            return (step_size, velocity), point.images + step_size * velocity

The loop (`ascent.ascend`) does all else: gradients, the projection of what a rule proposes,
histories, restarts. A rule's state is any pytree of arrays whose shapes stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ur_jax.attacks.ball import Ball
from ur_jax.registry import Registry
from ur_jax.types import Array, PyTree


class Point(NamedTuple):
    """Where an attack is, as a rule sees it.

    Attributes:
      images: (B,H,W,3) float32, in the ball.
      gradient: (B,H,W,3) float32 of each image's objective; finite; 0 for a rule without.
      objective: (B,) float32, what is maximised, at the images.
      number: of steps done so far, a scalar.
      keys: a key of this step for each image (B,), for rules that draw.
    """

    images: Array
    gradient: Array
    objective: Array
    number: Array
    keys: Array


class StepRule(Protocol):
    """What a rule has; made anew, without arguments, by what is registered under its name.

    It may also have `norms`, the ones that it knows, if not all; `needs_gradient = False`, which
    saves the gradients; and `start(ball, keys)`, its own first point instead of a uniform one.
    """

    @property
    def keeps_best(self) -> bool:
        """Whether an image ends at the best point that it passed through, or at the last one."""
        ...

    def init(self, ball: Ball, start: Array, step_size: float | Array, num_steps: int) -> PyTree:
        """The state before the first step.

        Args:
          ball: what the attack stays in.
          start: (B,H,W,3), the first point.
          step_size: of the config, > 0, in the ball's norm; traced.
          num_steps: that will be done; static.
        """
        ...

    def step(self, state: Any, ball: Ball, point: Point) -> tuple[PyTree, Array]:
        """The next state, and where to go (B,H,W,3): it is projected into the ball."""
        ...


RULES: Registry[Callable[[], StepRule]] = Registry("step rule", "ur_jax.step_rules")
"""Every step rule, by the name that `AttackConfig.rule` takes."""


def better(new: Any, old: Any) -> Any:
    """Of each image the one of the larger objective, the second of two tuples of (B, ...).

    NaN is less than any number.
    """
    return pick((new[1] > old[1]) | jnp.isnan(old[1]), new, old)


def pick(chosen: Array, new: Any, old: Any) -> Any:
    """Of each image (B,) the one or the other; pytrees of (B, ...)."""
    choose = lambda new, old: jnp.where(chosen.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return jax.tree.map(choose, new, old)


@RULES.register("fixed")
@dataclasses.dataclass(frozen=True)
class Fixed:
    """Steps of one length in the direction of steepest ascent, as in Madry et al. 2018."""

    keeps_best = False

    def init(self, ball, start, step_size, num_steps):
        return step_size

    def step(self, state, ball, point):
        return state, point.images + state * ball.direction(point.gradient)
