"""L-PGD: the attack on a loss, such as the encoder's own self-supervised one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from ur_jax.attacks.ascent import ascend
from ur_jax.attacks.ball import image_keys
from ur_jax.attacks.config import AttackConfig, split
from ur_jax.types import Array, Key, PyTree


class LossAttackResult(NamedTuple):
    """Attacked images (B,H,W,3), their losses (B,), and the losses before each step (B,T)."""

    images: Array
    loss: Array
    history: Array


def loss_pgd(
    loss_fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    images: Array,
    key: Key,
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
      Attacked images, their losses, and the loss before each step.

    Reference:
      Petrov & Kwiatkowska 2022, section 3.1. Unlike their MoCo v2 code, attacking moves neither
      queue nor key encoder (departure 4).
    """
    return _loss_pgd(loss_fn, params, images, image_keys(key, len(images)), *split(config))


@functools.partial(jax.jit, static_argnames=("loss_fn", "config"))
def _loss_pgd(loss_fn, params, images, keys, size, config) -> LossAttackResult:
    """`loss_pgd` without the checks."""

    def objective_fn(attacked):
        losses = loss_fn(params, attacked)
        return losses, losses

    end = ascend(objective_fn, lambda losses: losses, images, keys, size, config)
    return LossAttackResult(end.images, end.objective, end.records)
