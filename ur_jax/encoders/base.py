"""The encoder: a pytree that maps images to representations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ur_jax.errors import UserError, unknown_name
from ur_jax.types import Array, PyTree

PREPARATIONS = ("resize", "resize_crop")
DTYPES = ("float32", "bfloat16")


@struct.dataclass
class Encoder:
    """An encoder f: [0,1]^(HxWx3) -> R^D, in inference mode.

    A pytree: the parameters are its leaves, all else is static. It passes through `jit`, `grad`,
    `vmap` and `shard_map`, and new weights of the same network never recompile. Normalisation by
    mean and standard deviation is part of f, so a perturbation is measured in pixel units.

    Attributes:
      params: parameters of the network, any pytree.
      apply_fn: pure and jittable, (params, normalised images (B,H,W,3)) -> (B,D).
      name: name in tables and records.
      input_size: height and width of the images.
      preparation: how an image file becomes an input: "resize" to the input size, or "resize_crop"
        (shorter side resized, then the centre cropped). See `ur_jax.data`.
      mean: per-channel mean that f subtracts.
      std: per-channel standard deviation that f divides by.
      representation: which output of the network this is.
      dimension: D.
      dtype: compute dtype, "float32" or "bfloat16". The result is float32 either way.
    """

    params: PyTree
    apply_fn: Callable[[PyTree, Array], Array] = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    input_size: tuple[int, int] = struct.field(pytree_node=False)
    preparation: Literal["resize", "resize_crop"] = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)
    representation: str = struct.field(pytree_node=False)
    dimension: int = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    def __call__(self, images: Array) -> Array:
        """Returns the representations (B,D) float32 of images (B,H,W,3) float in [0,1].

        Raises:
          ValueError: for another shape, or pixels that are not floating point. The range is not
            looked at here, where it would cost a host sync: see `check_images`.
        """
        _check_shape(self, images)
        mean, std = (jnp.asarray(np.asarray(v, np.float32)) for v in (self.mean, self.std))
        normalised = (images.astype(jnp.float32) - mean) / std
        representations = self.apply_fn(self.params, normalised.astype(self.dtype))
        return representations.astype(jnp.float32)


def from_fn(
    apply_fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    *,
    input_size: tuple[int, int],
    name: str = "custom",
    preparation: str = "resize",
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    representation: str = "paper",
    dtype: str = "float32",
) -> Encoder:
    """Makes an encoder of any jittable function, such as `module.apply` of a Flax module.

    Build it once and reuse it: `apply_fn` is compared by identity, so that a fresh lambda or a
    fresh bound method recompiles everything that takes the encoder.

    Args:
      apply_fn: (params, normalised images (B,H,W,3) of `dtype`) -> (B,D).
      params: its parameters, any pytree; floating-point leaves are cast to `dtype`.
      input_size: height and width of the images, in pixels.
      name: name in tables and records.
      preparation: "resize" or "resize_crop", see `Encoder`.
      mean: per-channel mean to subtract from the [0,1] pixels.
      std: per-channel standard deviation to divide by, > 0.
      representation: name of the output.
      dtype: compute dtype, "float32" or "bfloat16".

    Returns:
      The encoder. Its dimension is read from the function's output shape.

    Raises:
      ValueError: for an unknown preparation or dtype, parameters that are not finite, a standard
        deviation <= 0, or an output that is not (B,D).
    """
    if preparation not in PREPARATIONS:
        raise unknown_name("preparation", preparation, PREPARATIONS)
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if min(std) <= 0:
        raise UserError(f"Expected std > 0 in every channel, got {std}.")
    check_finite(params, name)
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    params = jax.tree.map(cast, jax.tree.map(jnp.asarray, params))
    images = jax.ShapeDtypeStruct((2, *input_size, 3), dtype)
    output = jax.eval_shape(apply_fn, params, images)
    if not isinstance(output, jax.ShapeDtypeStruct) or output.ndim != 2 or output.shape[0] != 2:
        raise UserError(
            f"Expected {name!r} to map images (B,{input_size[0]},{input_size[1]},3) to one array "
            f"(B,D); for B=2 it gives {jax.tree.map(lambda x: x.shape, output)}. "
            "Flatten or pool its output."
        )
    return Encoder(
        params=params,
        apply_fn=apply_fn,
        name=name,
        input_size=tuple(input_size),
        preparation=preparation,
        mean=tuple(mean),
        std=tuple(std),
        representation=representation,
        dimension=output.shape[1],
        dtype=dtype,
    )


def check_images(encoder: Encoder, images: Array) -> None:
    """Raises ValueError unless `images` are (B,H,W,3), floating point, finite and in [0,1].

    Looks at the values, hence waits for them; tracers are only checked for shape and dtype.
    """
    _check_shape(encoder, images)
    if isinstance(images, jax.core.Tracer):
        return
    # By comparisons, which a NaN fails: on CPUs a vectorised minimum or maximum can lose it.
    if not jnp.all((images >= 0.0) & (images <= 1.0)):
        low, high = float(jnp.min(images)), float(jnp.max(images))
        remedy = "divide by 255" if high > 1.5 else "clip the images, and look for NaN"
        raise UserError(f"Expected pixels in [0,1], got [{low:g}, {high:g}]; {remedy}.")


def check_finite(params: PyTree, name: str) -> None:
    """Raises ValueError naming the parameters of encoder `name` that hold NaN or infinity."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.isfinite(np.asarray(leaf)).all()
    ]
    if bad:
        raise UserError(
            f"Weights of encoder {name!r} are NaN or infinite in {', '.join(bad[:5])}"
            f"{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}. Expected finite weights; "
            "fetch or train the checkpoint again."
        )


def _check_shape(encoder: Encoder, images: Array) -> None:
    """Raises ValueError unless the static shape and dtype of `images` fit the encoder."""
    expected = (*encoder.input_size, 3)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise UserError(
            f"Expected images (B,{','.join(map(str, expected))}) for encoder {encoder.name!r}, got "
            f"{tuple(images.shape)}; resize them, or load them with `ur_jax.data.image_batches`."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"Expected floating-point images in [0,1], got {images.dtype}; "
            "convert with images.astype('float32') / 255."
        )
