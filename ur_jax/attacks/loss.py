"""L-PGD: the attack on a loss, such as the encoder's own self-supervised one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ur_jax.attacks.ascent import Health, ascend
from ur_jax.attacks.ball import image_keys
from ur_jax.attacks.config import AttackConfig, check_radius, split
from ur_jax.checks import check_pixels, check_type
from ur_jax.errors import UserError
from ur_jax.types import Array, Images, Keys, PyTree


class LossAttackResult(NamedTuple):
    """Attacked images (B,H,W,3), their losses (B,), the losses before each step (B,T), health."""

    images: Array
    loss: Array
    history: Array
    health: Health


def loss_pgd(
    loss_fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    images: Images,
    key: Keys,
    *,
    config: AttackConfig,
) -> LossAttackResult:
    """L-PGD: maximises a per-image loss, such as the encoder's own self-supervised one.

    Args:
      loss_fn: pure and jittable, (params, images (B,H,W,3)) -> losses (B,) float32. It is compared
        by identity: a fresh lambda per call recompiles.
      params: what the loss takes beside the images (weights, keys, queue, ...), any pytree. It is
        read and never changed; no gradient with respect to it is computed.
      images: originals (B,H,W,3) float32 in [0,1].
      key: as in `u_pgd`.
      config: as in `u_pgd`. L-FGSM is `fgsm_config(eps)`.

    Returns:
      Attacked images, finite whatever the loss is, their losses, and the loss before each step.

    Raises:
      UserError: for images, a key or a config as in `u_pgd`, or a loss that is not one float32 for
        each image.

    Reference:
      Petrov & Kwiatkowska 2022, section 3.1. Unlike their MoCo v2 code, attacking moves neither
      queue nor key encoder (departure 4).
    """
    check_type("config", config, AttackConfig)
    check_pixels(images)
    check_radius(config, images)
    if not callable(loss_fn):
        raise UserError(
            f"Expected loss_fn to be a function of (params, images), got {type(loss_fn).__name__}."
        )
    return _loss_pgd(loss_fn, params, images, image_keys(key, len(images)), *split(config))


@functools.partial(jax.jit, static_argnames=("loss_fn", "config"))
def _loss_pgd(loss_fn, params, images, keys, size, config) -> LossAttackResult:
    """`loss_pgd` without the checks."""

    def objective_fn(attacked, draws):
        losses = loss_fn(params, attacked)
        _check_losses(losses, len(attacked))
        return losses, losses

    end = ascend(objective_fn, lambda losses: (), images, keys, size, config)
    return LossAttackResult(end.images, end.objective, end.objectives, end.health)


def _check_losses(losses: Any, num_images: int) -> None:
    """Refuses, while tracing, what is not a loss for each image."""
    shape, dtype = getattr(losses, "shape", None), getattr(losses, "dtype", None)
    if shape != (num_images,) or dtype != jnp.float32:
        got = type(losses).__name__ if shape is None else f"{dtype} of shape {shape}"
        raise UserError(
            f"Expected losses ({num_images},) float32, one for each image, got {got}; leave out "
            "the mean over the batch."
        )
