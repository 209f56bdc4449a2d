"""The momentum iterative method: gradients add up, and their sum gives the direction.

Reference: Dong et al. 2018, "Boosting Adversarial Attacks with Momentum" (arXiv:1710.06081),
algorithm 1.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ur_jax.attacks.rules import RULES


@RULES.register("momentum")
@dataclasses.dataclass(frozen=True)
class Momentum:
    """Steps of one length along g_{k+1} = decay g_k + gradient / |gradient|_1; the best point seen.

    Attributes:
      decay: of the gradients of before.
    """

    decay: float = 1.0
    keeps_best = True

    def init(self, ball, start, step_size, num_steps):
        return step_size, jnp.zeros_like(start)

    def step(self, state, ball, point):
        step_size, velocity = state
        # By the largest entry first: a sum of small or large ones could leave float32.
        largest = jnp.max(jnp.abs(point.gradient), axis=(1, 2, 3), keepdims=True)
        gradient = point.gradient / jnp.where(largest > 0, largest, 1.0)
        total = jnp.sum(jnp.abs(gradient), axis=(1, 2, 3), keepdims=True)
        velocity = self.decay * velocity + gradient / jnp.maximum(total, 1.0)
        return (step_size, velocity), point.images + step_size * ball.direction(velocity)
