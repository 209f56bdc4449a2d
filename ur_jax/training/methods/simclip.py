"""Attacked and clean images of one direction: Sim-CLIP."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ur_jax.training.losses import normalize
from ur_jax.training.methods.base import Start, register
from ur_jax.training.methods.fare import Fare, FareConfig
from ur_jax.types import PyTree


@register("simclip")
@dataclasses.dataclass(frozen=True)
class SimClipConfig(FareConfig):
    """Settings of Sim-CLIP; its attack and its optimizer are the command's.

    Attributes:
      noise: As of fare.
    """

    needs_random_start: ClassVar[bool] = True  # at the image itself its gradient is 0

    def make(self, start: Start) -> tuple[SimClip, PyTree]:
        encoder = start.encoder()
        return SimClip.of(encoder, start.dtype), encoder.params


@dataclasses.dataclass(frozen=True)
class SimClip(Fare):
    """Sim-CLIP: attacked and clean images shall have representations of one direction.

      minimise over theta   mean_x  (d(a, stop(c)) + d(stop(a), c)) / 2,   d(u, v) = 1 - cos(u, v)

    with a = f_theta(x + delta), c = f_theta(x), and delta the "loss" attack of `train_step`, which
    raises 1 - cos(a, c). Its gradient is half of that of 1 - cos(a, c) without any stop, so that
    nothing but a small learning rate and few steps keeps the encoder near the original: the metric
    "relative_drift" is the squared distance that clean representations have moved over their
    squared length, "cosine" that of attacked and clean images. The attack needs a random start.

    Attributes:
      encoder, dtype: as in `Fare`, whose inference mode it has.

    Reference:
      Hossain & Imteaj 2024, "Sim-CLIP", arXiv:2407.14971.
    """

    def targets(self, state, views, key, apart):
        """Representations of the clean first views: the original's (B,D), and those of now."""
        target, original = super().targets(state, views, key, apart)
        encode = lambda images: (self.represent(state.variables, state.target, images), {})
        return target, (original, apart(encode, views.first)[0])

    def attack_losses(self, variables, target, targets, rows, images):
        """1 - cosine (b,) with the clean image's representation of now."""
        return _apart(self.represent(variables, target, images), targets[1][rows])

    def losses(self, variables, target, targets, part):
        """The symmetric loss (b,) of the attacked images; without attack of the clean ones."""
        original = targets[0][part.rows]
        clean = self.represent(variables, target, part.views.first)
        moved = clean
        if part.attacked is not None:
            moved = self.represent(variables, target, part.attacked)
        stop = jax.lax.stop_gradient
        losses = 0.5 * (_apart(moved, stop(clean)) + _apart(stop(moved), clean))
        drift, length = (jnp.sum(jnp.square(x), axis=-1) for x in (clean - original, original))
        metrics = {
            "cosine": jnp.mean(1.0 - losses),
            "relative_drift": jnp.mean(drift / jnp.maximum(length, 1e-12)),
        }
        return losses, {}, metrics


def _apart(moved, clean):
    """1 - cosine (b,)."""
    return 1.0 - jnp.sum(normalize(moved) * normalize(clean), axis=-1)
