"""Encoders: the pytree, the networks, and the benchmarked encoders."""

from ur_jax.encoders.base import Encoder, check_images, from_fn

__all__ = ["Encoder", "check_images", "from_fn"]
