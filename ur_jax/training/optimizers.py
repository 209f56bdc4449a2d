"""Optimizers and schedules as the published training code has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ur_jax.errors import UserError
from ur_jax.types import PyTree

Schedule = optax.Schedule
Mask = PyTree | Callable[[PyTree], PyTree] | None


def cosine_schedule(
    base_rate: float,
    *,
    steps_per_epoch: int,
    num_epochs: float,
    warmup_epochs: float = 0.0,
    start_epoch: float = 0.0,
    per_epoch: bool = False,
) -> Schedule:
    """Learning rate by step: linear warm-up from 0, then half a cosine to 0, where it stays.

    Optax's schedule, asked at epochs: warm-ups are parts of an epoch, and MoCo v2 keeps the rate of
    the epoch's beginning.

    Args:
      base_rate: the peak.
      steps_per_epoch: steps that make one epoch.
      num_epochs: epochs until 0 is reached, counted from epoch 0; more than `warmup_epochs`.
      warmup_epochs: epochs of warm-up.
      start_epoch: the epoch of step 0, where training goes on from a checkpoint.
      per_epoch: constant within an epoch, as MoCo v2 has it.

    Raises:
      ValueError: for a warm-up that is not over when the rate shall be 0.
    """
    if not 0 <= warmup_epochs < num_epochs:
        raise UserError(
            f"Expected 0 <= warmup_epochs < {num_epochs:g}, where the learning rate reaches 0, got "
            f"{warmup_epochs:g}; shorten the warm-up or train for longer."
        )
    warmup_cosine: Any = optax.warmup_cosine_decay_schedule  # whose counts may be fractions
    of_epoch = warmup_cosine(0.0, base_rate, warmup_epochs, num_epochs)

    def schedule(step):
        epoch = step / steps_per_epoch
        return of_epoch(start_epoch + (jnp.floor(epoch) if per_epoch else epoch))

    return schedule


def momentum_schedule(
    base: float, *, steps_per_epoch: int, num_epochs: float, start_epoch: float = 0.0
) -> Schedule:
    """Key momentum by step: from `base` at epoch 0 to 1 at `num_epochs`, by half a cosine.

    Args:
      base: share of itself that the key encoder keeps at epoch 0.
      steps_per_epoch: steps that make one epoch.
      num_epochs: epochs until 1 is reached, counted from epoch 0.
      start_epoch: the epoch of step 0, where training goes on from a checkpoint.

    Reference:
      Chen et al. 2021, arXiv:2104.02057, and its code.
    """

    cosine: Any = optax.cosine_decay_schedule  # whose counts may be fractions
    away = cosine(1.0 - base, num_epochs)
    return lambda step: 1.0 - away(start_epoch + step / steps_per_epoch)


def trained_mask(frozen: Sequence[str]) -> Callable[[PyTree], PyTree]:
    """Returns a mask of parameters for weight decay: False for those that training leaves alone.

    Args:
      frozen: regular expressions of "/"-separated paths; a path matches that ends with one.
    """

    def mask(params):
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        is_trained = lambda path, _: (
            not any(re.search(rf"(^|/){pattern}$", name(path)) for pattern in frozen)
        )
        return jax.tree_util.tree_map_with_path(is_trained, params)

    return mask


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    mask: Mask = None,
) -> optax.GradientTransformation:
    """SGD as PyTorch has it: the decay, on every parameter of `mask`, is part of the gradient."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask), optax.sgd(schedule, momentum=momentum)
    )


def adamw(
    schedule: optax.Schedule, *, weight_decay: float = 0.1, mask: Mask = None
) -> optax.GradientTransformation:
    """AdamW with its usual betas (0.9, 0.999); the decay is on every parameter of `mask`."""
    inner = optax.adamw(schedule, weight_decay=weight_decay, mask=mask)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # it raises its betas to an integer power
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)
