"""Encoders: the pytree, the networks, the published encoders, and those of one's own."""

from ur_jax.encoders.base import Encoder, check_images, from_fn
from ur_jax.encoders.modules import from_linen, from_nnx

__all__ = ["Encoder", "check_images", "from_fn", "from_linen", "from_nnx"]
