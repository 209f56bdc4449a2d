"""Another output of an encoder's network, with the same weights in memory once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ur_jax.encoders import factories
from ur_jax.encoders.base import Encoder
from ur_jax.encoders.networks.network import NetworkFn
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import UserError, unknown_name


def with_representation(encoder: Encoder, representation: str) -> Encoder:
    """The encoder whose output is another representation of the same network.

    Args:
      encoder: the encoder. One of a function of one's own is made anew by that function, where it
        makes several, and gets the weights; "paper" and "features" are what it gives by itself.
      representation: "paper", "features", "backbone", "projection" or another output.

    Raises:
      UserError: for an output that the network does not have.
    """
    fn = encoder.apply_fn
    if not isinstance(fn, NetworkFn):
        return _of_own(encoder, representation)
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


def _of_own(encoder: Encoder, representation: str) -> Encoder:
    """The same of an encoder of a user's own function."""
    place, by_itself = encoder.origin.place, factories.DEFAULT_REPRESENTATIONS
    if encoder.representation == representation or (
        encoder.representation in by_itself and representation in by_itself
    ):
        return encoder
    if place is None or not factories.is_place(place):
        if representation in by_itself:
            return encoder
        raise UserError(
            f"Encoder {encoder.name!r} gives one representation, {encoder.representation!r}, got "
            f"{representation!r}; name a function that makes both, as in file.py:make."
        )
    made = factories.make(place, encoder.origin.arguments, representation, encoder.dtype)
    if made.representation == encoder.representation:
        return encoder
    have, wanted = (
        jax.tree_util.tree_map(lambda leaf: (jnp.shape(leaf), leaf.dtype), e.params)
        for e in (encoder, made)
    )
    if have != wanted:
        raise UserError(
            f"Expected {place} to make {made.representation!r} with the same parameters as "
            f"{encoder.representation!r}; have it make one network, and choose its output."
        )
    return dataclasses.replace(made, params=encoder.params, name=encoder.name)
