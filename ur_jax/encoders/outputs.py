"""Another output of an encoder's network, with the same weights in memory once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ur_jax.encoders.base import Encoder
from ur_jax.encoders.networks.network import NetworkFn
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import unknown_name


def with_representation(encoder: Encoder, representation: str) -> Encoder:
    """The encoder whose output is another representation of the same network.

    Args:
      encoder: the encoder. A user's own function has one output: it is returned as it is.
      representation: "paper", "features", "backbone", "projection" or another output.

    Raises:
      UserError: for an output that the network does not have.
    """
    fn = encoder.apply_fn
    if not isinstance(fn, NetworkFn):
        return encoder
    images = jax.ShapeDtypeStruct((2, *encoder.input_size, 3), jnp.dtype(encoder.dtype))
    outputs = jax.eval_shape(fn.network.apply, encoder.params, images)
    spec, output = ENCODERS.get(encoder.name), representation
    if spec is not None and representation in ("paper", "features"):
        output = getattr(spec, representation)
    if output not in outputs:
        raise unknown_name("representation", representation, ("paper", "features", *outputs))
    return dataclasses.replace(
        encoder,
        apply_fn=dataclasses.replace(fn, representation=output),
        representation=representation,
        dimension=outputs[output].shape[-1],
    )
