"""How far smoothed encoders move under an attack: what stands beside what is certified."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.attacks import AttackConfig, u_pgd
from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.joint.smoothed import smoothed
from ur_jax.encoders.base import Encoder, from_fn
from ur_jax.types import Image, Key

MOVING = ("geometric_median", "mean", "cosine")
"""Smoothed encoders of which a distance is certified."""


def attacked_image(
    encoder: Encoder, image: Image, key: Key, *, config: StreamConfig, draws: int = 64,
    num_steps: int = 20,
) -> np.ndarray:  # fmt: skip
    """Attacks the mean of samples under common noise, by APGD in the l2 ball of the first eps_in.

    Args:
      encoder: the encoder.
      image: [H,W,3] float32 in [0,1].
      key: typed key, of the noise and of the start.
      config: sigma and eps_in.
      draws: samples, the same in every step.
      num_steps: of APGD.

    Returns:
      [H,W,3] float32, within eps_in of the image.
    """
    eps = config.eps_in[0]
    noise = config.sigma * jax.random.normal(key, (draws, *image.shape))
    common = from_fn(
        _mean_under, {"encoder": encoder, "noise": noise}, input_size=encoder.input_size
    )
    settings = AttackConfig(eps=eps, step_size=eps / 4, num_steps=num_steps, norm="l2", rule="apgd")
    return np.asarray(u_pgd(common, image[None], key, config=settings).images[0])


def movement(
    encoder: Encoder, image: Image, moved: Image, key: Key, *, method: str, config: StreamConfig,
    m: int = 2000, batch_size: int = 64,
) -> float:  # fmt: skip
    """How far apart the smoothed encoder's values of two images are, of m samples each.

    Both are rounded to the grid of 256 grey values where the noise asks for it: that is part of
    what is smoothed, and moves an image by next to nothing beside the noise.

    Args:
      encoder: the encoder.
      image, moved: [H,W,3] float32 in [0,1].
      key: typed key of the samples.
      method: one of `MOVING`.
      config: its settings.
      m: samples.
      batch_size: samples per device and forward pass.

    Returns:
      The l2 distance; of cosine, 1 - cosine.
    """
    both = np.stack([image, moved]).astype(np.float32)
    if config.noise == "grid":
        both = (np.round(both * 255) / 255).astype(np.float32)
    here, there = smoothed(
        encoder, both, key, method=method, m=m, config=config, batch_size=batch_size
    ).astype(np.float64)
    if method != "cosine":
        return float(np.linalg.norm(here - there))
    return 1.0 - float(here @ there / np.linalg.norm(here) / np.linalg.norm(there))


def _mean_under(params, images):
    """Mean representation of each image under the same noise."""
    add = lambda noise: params["encoder"](jnp.clip(images + noise, 0.0, 1.0))
    return jax.lax.map(add, params["noise"]).mean(axis=0)
