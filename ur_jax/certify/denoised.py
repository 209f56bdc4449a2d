"""Denoised smoothing: an encoder behind a denoiser, as one encoder."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ur_jax.checks import check_type
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.types import Array


def denoised(encoder: Encoder, denoiser: Callable[[Array], Array]) -> Encoder:
    """The encoder of denoised images: f(clip(denoiser(x), 0, 1)).

    **Guarantee.** Every certificate of it is one of this whole function: the noise is added before
    the denoiser, which no one else needs to trust. It makes representations under noise lie closer
    together, so bounds tighter; it changes nothing of what is proved.

    Args:
      encoder: the encoder.
      denoiser: images [B,H,W,3] in [0,1] to images of the same shape; any jittable function, or a
        pytree that can be called, whose arrays then are parameters. Build it once: it is compared
        by identity.

    Returns:
      An encoder of the same input size and representation.

    Raises:
      UserError: for a denoiser that is no function, or gives another shape.

    Reference: H. Salman et al., "Denoised smoothing" (2020).
    """
    check_type("encoder", encoder, Encoder)
    if not callable(denoiser):
        raise UserError(
            f"Expected a function of images as denoiser, got {type(denoiser).__name__}."
        )
    if jax.tree_util.all_leaves([denoiser]):  # a plain function
        denoiser = jax.tree_util.Partial(denoiser)
    images = jax.ShapeDtypeStruct((2, *encoder.input_size, 3), jnp.float32)
    found = jax.eval_shape(lambda d, x: d(x), denoiser, images)
    if getattr(found, "shape", None) != images.shape:
        raise UserError(
            f"Expected a denoiser that gives images of shape {images.shape}, got "
            f"{getattr(found, 'shape', type(found).__name__)}."
        )
    return encoder.replace(
        params={"denoiser": denoiser, "encoder": encoder},
        apply_fn=_denoise_and_encode,
        name=f"denoised-{encoder.name}",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        dtype="float32",
    )


def _denoise_and_encode(params, images):
    """Represents denoised images; a function object that stays the same."""
    return params["encoder"](jnp.clip(params["denoiser"](images), 0.0, 1.0))
