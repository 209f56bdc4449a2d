"""The encoder: a pytree that maps images to representations."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.errors import ModifyScopeVariableError
from jax.core import Tracer
from jaxtyping import Float, Float32

from ur_jax.checks import check_array, check_pixels
from ur_jax.encoders.preparation import parse_preparation
from ur_jax.errors import UserError, unknown_name
from ur_jax.types import AnyArray, Array, Images, PyTree

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Origin:
    """How an encoder can be made again.

    It is no part of the function: any two are equal, so that nothing is compiled anew for the place
    that an encoder is from.

    Attributes:
      place: of the function that makes it, "package.module:make" or "file.py:make"; of a published
        encoder its name; None where it is not known.
      arguments: keyword arguments, JSON values.
    """

    place: str | None = dataclasses.field(default=None, compare=False)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


@struct.dataclass(eq=False)  # of arrays `==` says nothing; so it has a hash
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
      preparation: how an image file becomes an input: "resize" to the input size, "resize_crop"
        (shorter side resized, then the centre cropped), or another of `encoders.preparation`.
      mean: per-channel mean that f subtracts.
      std: per-channel standard deviation that f divides by.
      representation: which output of the network this is.
      dimension: D.
      dtype: compute dtype, "float32" or "bfloat16". The result is float32 either way.
      origin: how it can be made again, for `save_encoder`.
    """

    params: PyTree
    apply_fn: Callable[[PyTree, Array], Array] = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    input_size: tuple[int, int] = struct.field(pytree_node=False)
    preparation: str = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)
    representation: str = struct.field(pytree_node=False)
    dimension: int = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)
    origin: Origin = struct.field(pytree_node=False, default=Origin())

    def __call__(self, images: Images) -> Float32[Array, "batch dim"]:
        """Returns the representations (B,D) float32 of images (B,H,W,3) float in [0,1].

        Raises:
          UserError: for another shape or dtype; outside of a transformation such as `jit`, which
            has no pixels to look at, also for pixels that are not in [0,1].
        """
        check_images(self, images)
        mean, std = (jnp.asarray(np.asarray(v, np.float32)) for v in (self.mean, self.std))
        normalised = (jnp.asarray(images).astype(jnp.float32) - mean) / std
        representations = self.apply_fn(self.params, normalised.astype(self.dtype))
        return representations.astype(jnp.float32)

    def replace(self, **changes: Any) -> Encoder:
        """The encoder with other values of some attributes."""
        return dataclasses.replace(self, **changes)

    def check(self, images: Array | np.ndarray) -> tuple[str, ...]:
        """Doubts the encoder on a few images: inference mode, NaN inside, spread, gradient, scale.

        Args:
          images: (B,H,W,3) float32 in [0,1], of different content; the first four are looked at.

        Returns:
          What a user should know though it stops nothing, a sentence each; see `checking.check`.

        Raises:
          UserError: for an encoder whose numbers would mean nothing.
        """
        from ur_jax.encoders import checking  # it is written in terms of encoders

        return checking.check(self, images)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(math.prod(np.shape(leaf)) for leaf in leaves)
        height, width = self.input_size
        return (
            f"Encoder({self.name!r}, {self.representation!r}: ({height}, {width}, 3) -> "
            f"({self.dimension},), {self.dtype}, {count:,} parameters)"
        )


def from_fn(
    apply_fn: Callable[[PyTree, Float[Array, "batch height width 3"]], Float[Array, "batch dim"]],
    params: PyTree,
    *,
    input_size: tuple[int, int],
    name: str = "custom",
    preparation: str = "resize",
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    representation: str = "paper",
    dtype: str = "float32",
    check: bool = False,
) -> Encoder:
    """Makes an encoder of any jittable function, such as `module.apply` of a Flax module.

    Build it once and reuse it: `apply_fn` is compared by identity, so that a fresh lambda or a
    fresh bound method recompiles everything that takes the encoder.

    Args:
      apply_fn: (params, normalised images (B,H,W,3) of `dtype`) -> (B,D).
      params: its parameters, any pytree of arrays and numbers; floating-point leaves are cast to
        `dtype`.
      input_size: height and width of the images, in pixels.
      name: name in tables and records.
      preparation: "resize", "resize_crop" or another, see `Encoder`.
      mean: per-channel mean to subtract from the [0,1] pixels.
      std: per-channel standard deviation to divide by, > 0.
      representation: name of the output.
      dtype: compute dtype, "float32" or "bfloat16".
      check: look at once whether it is one, on images of noise, see `Encoder.check`; what stops
        nothing is warned of.

    Returns:
      The encoder. Its dimension is read from the function's output shape.

    Raises:
      UserError: for an unknown preparation or dtype, a mean that is not finite, a standard
        deviation that is not or is <= 0, parameters that are no arrays or not finite, a network in
        training mode, or an output that is not (B,D).
    """
    if not callable(apply_fn):
        raise UserError(
            f"Expected a function of (params, images) as apply_fn, got {type(apply_fn).__name__}."
        )
    parse_preparation(preparation)
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    for what, text in (("name", name), ("representation", representation)):
        if not isinstance(text, str) or not text:
            raise UserError(f"Expected {what} as a text that tells it from others, got {text!r}.")
    size, mean, std = _size(input_size), _channels("mean", mean), _channels("std", std)
    if min(std) <= 0:
        raise UserError(f"Expected std > 0 in every channel, got {std}.")
    params = jax.tree_util.tree_map_with_path(_as_array, params)
    check_finite(params, name)
    params = _cast(params, dtype)
    encoder = Encoder(
        params=params,
        apply_fn=apply_fn,
        name=name,
        input_size=size,
        preparation=preparation,
        mean=mean,
        std=std,
        representation=representation,
        dimension=_dimension(apply_fn, params, size, dtype, name),
        dtype=dtype,
    )
    if check:
        images = np.random.default_rng(0).random((4, *size, 3), np.float32)
        for remark in encoder.check(images):
            warnings.warn(remark, stacklevel=2)
    return encoder


def _dimension(apply_fn, params: PyTree, size: tuple[int, int], dtype: str, name: str) -> int:
    """D of a function that gives (B,D); refuses any other."""
    images = jax.ShapeDtypeStruct((2, *size, 3), dtype)
    try:
        output = jax.eval_shape(apply_fn, params, images)
    except ModifyScopeVariableError as error:
        raise UserError(
            f"Expected {name!r} in inference mode, but it changes its own variables, as BatchNorm "
            "does in training (a representation would depend on the other images of its batch): "
            "pass train=False, use_running_average=True or what the module calls it, or make it "
            "with `from_linen`."
        ) from error
    except jax.errors.JAXTypeError as error:  # NumPy, or a decision by a value
        why = str(error).splitlines()[0].rstrip(":.")
        raise UserError(
            f"Expected {name!r} to be a function that JAX can trace, of jax.numpy alone, with no "
            f"`if` by an array's values: {why}."
        ) from error
    if (
        not isinstance(output, jax.ShapeDtypeStruct)
        or output.shape[:1] != (2,)
        or output.ndim != 2
        or output.shape[1] < 1
        or not jnp.issubdtype(output.dtype, jnp.floating)
    ):
        shown = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", output)
        raise UserError(
            f"Expected {name!r} to map images (B,{size[0]},{size[1]},3) to one floating-point "
            f"array (B,D); for B=2 it gives {shown}. Flatten or pool its output, or "
            "pick one of several."
        )
    return output.shape[1]


def _size(input_size: Sequence[int]) -> tuple[int, int]:
    """Height and width; refuses what is none."""
    try:
        height, width = (int(n) for n in input_size)
        if min(height, width) < 1 or (height, width) != tuple(input_size):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"Expected input_size (height, width) in pixels, such as (224, 224), got "
            f"{input_size!r}."
        ) from None
    return height, width


def _channels(what: str, values: Sequence[float]) -> tuple[float, float, float]:
    """A number for each channel; refuses what is none."""
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError(f"Expected {what} of 3 channels, got {values!r}.") from None
    if not np.isfinite([red, green, blue]).all():
        raise UserError(f"Expected a finite {what} in every channel, got {values!r}.")
    return red, green, blue


def _as_array(path: Any, leaf: Any) -> Array:
    """A leaf of the parameters as an array."""
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)):
        try:
            # Not jnp.asarray, which compiles a program for each shape: seconds on a GPU.
            # A copy of NumPy's, whose memory JAX may keep: later changes of it change no encoder.
            is_numpy = isinstance(leaf, np.ndarray)
            return jax.device_put(np.array(leaf)) if is_numpy else jnp.asarray(leaf)
        except TypeError:  # an array of objects or of text
            pass
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    raise UserError(
        f"Expected params of arrays and numbers, got {type(leaf).__name__} {leaf!r:.40} at "
        f"{name!r}; keep what is no number in apply_fn."
    )


def _cast(params: PyTree, dtype: str) -> PyTree:
    """Floating-point leaves in `dtype`, by one program for all that are not."""
    leaves, structure = jax.tree.flatten(params)
    other = [
        i
        for i, leaf in enumerate(leaves)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and (leaf.dtype != dtype or leaf.weak_type)
    ]
    for i, leaf in zip(other, _as_type([leaves[i] for i in other], dtype), strict=True):
        leaves[i] = leaf
    return structure.unflatten(leaves)


@functools.partial(jax.jit, static_argnames="dtype")
def _as_type(arrays: list[Array], dtype: str) -> list[Array]:
    """Arrays in `dtype`."""
    return [x.astype(dtype) for x in arrays]


def check_images(encoder: Encoder, images: AnyArray) -> None:
    """The gate for images: raises UserError unless they are (B,H,W,3) float32, each in [0,1].

    Looks at the values, hence waits for them; tracers are only checked for shape and dtype.
    """
    _check_shape(encoder, images)
    check_pixels(images)


def check_finite(params: PyTree, name: str) -> None:
    """Raises ValueError naming the parameters of encoder `name` that hold NaN or infinity."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if not isinstance(leaf, Tracer)
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
        and not np.isfinite(np.asarray(leaf)).all()
    ]
    if bad:
        raise UserError(
            f"Weights of encoder {name!r} are NaN or infinite in {', '.join(bad[:5])}"
            f"{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}. Expected finite weights; "
            "fetch or train the checkpoint again."
        )


def _check_shape(encoder: Encoder, images: AnyArray) -> None:
    """Raises UserError unless the shape of `images` fit the encoder."""
    expected = (*encoder.input_size, 3)
    check_array("images", images)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise UserError(
            f"Expected images (B,{','.join(map(str, expected))}) for encoder {encoder.name!r}, got "
            f"{tuple(images.shape)}; resize them, or load them with `ur_jax.data.image_batches`."
        )
