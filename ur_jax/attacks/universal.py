"""One perturbation for all images: made on a stream of them, measured on others.

Reference: Moosavi-Dezfooli et al. 2017, "Universal adversarial perturbations" (arXiv:1610.08401);
by mini-batch ascent as in Shafahi et al. 2020, "Universal Adversarial Training"
(arXiv:1811.11304), algorithm 2.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from ur_jax.attacks.ball import Ball
from ur_jax.attacks.config import AttackConfig, split
from ur_jax.attacks.objectives import OBJECTIVES, Aim
from ur_jax.checks import check_key, check_pixels, check_type
from ur_jax.encoders.base import Encoder, check_images
from ur_jax.errors import UserError
from ur_jax.types import Array, Image, Images, Key, OnDevice


def universal_perturbation(
    encoder: Encoder, batches: Iterable[Images], key: Key, *, config: AttackConfig
) -> Array:
    """One perturbation that moves the representations of a stream of images, on the average.

        maximise over |delta| <= eps the mean over x of |f(clip(x + delta)) - f(x)|

    One step per batch, so the stream decides how many there are: give batches several times for
    several passes. The gradient is of the mean distance, not of its square: no single image that
    is far already decides.

    Args:
      encoder: the encoder f.
      batches: images (B,H,W,3) float32 in [0,1], all batches of one shape.
      key: typed key of the start.
      config: eps, norm ("linf" or "l2") and the step size; its steps, restarts and rule are not
        used. "l2" and "cosine" are the objectives there are.

    Returns:
      The perturbation (H,W,3) float32, in the ball about 0; `perturbed` adds it.

    Raises:
      UserError: for an empty stream, images that are none, or settings that are not for it.
    """
    check_type("encoder", encoder, Encoder)
    check_type("config", config, AttackConfig)
    check_key(key)
    if config.norm == "l1" or config.objective not in ("l2", "cosine"):
        raise UserError(
            "Expected norm linf or l2 and objective l2 or cosine for a universal perturbation, got "
            f"{config.norm} and {config.objective}."
        )
    size, settings = split(config)
    delta = None
    for images in batches:
        check_images(encoder, images)
        if delta is None:
            delta = _start(jnp.asarray(images), key, size, settings.norm)
        delta = _advance(encoder, jnp.asarray(images), delta, size, settings)
    if delta is None:
        raise UserError("Expected at least one batch of images, got none.")
    return delta


def perturbed(images: Images, perturbation: Image) -> OnDevice:
    """Images (B,H,W,3) with one perturbation (H,W,3) added, clipped to [0,1]."""
    check_pixels(images)
    return jnp.clip(jnp.asarray(images) + perturbation, 0.0, 1.0)


def _start(images, key, size, norm):
    """A random perturbation in the ball; at 0 there would be no gradient."""
    grey = jnp.full_like(images[:1], 0.5)
    drawn = Ball(grey, 1.0, norm).draw(key[None]) - 0.5  # in the box, which is larger
    return _into_ball(size.eps * drawn[0], size.eps, norm)


@functools.partial(jax.jit, static_argnames="config")
def _advance(encoder, images, delta, size, config):
    """The perturbation after a step on one batch."""
    objective = OBJECTIVES[config.objective]()
    aim = Aim(jax.lax.stop_gradient(encoder(images)), is_targeted=False)

    def mean(delta):
        moved = objective(encoder(jnp.clip(images + delta, 0.0, 1.0)), aim)
        positive = moved > 0.0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, moved, 1.0)), 0.0).mean()

    gradient = jnp.nan_to_num(jax.grad(mean)(delta))
    direction = Ball(images[:1], size.eps, config.norm).direction(gradient[None])[0]
    return _into_ball(delta + size.step_size * direction, size.eps, config.norm)


def _into_ball(delta, eps, norm):
    """The nearest perturbation of the ball about 0; the box is each image's own."""
    if norm == "linf":
        return jnp.clip(delta, -eps, eps)
    return delta * jnp.minimum(1.0, eps / jnp.maximum(jnp.linalg.norm(delta), eps))
