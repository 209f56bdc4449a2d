"""Encoders by name: from a converted checkpoint, a published file, or this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.encoders import checkpoints, torch_files
from ur_jax.encoders.base import Encoder, from_fn
from ur_jax.encoders.networks.layers import fold_batch_norm
from ur_jax.encoders.networks.network import NetworkFn
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.encoders.zoo.spec import EncoderSpec
from ur_jax.errors import NotFoundError, UserError, unknown_name
from ur_jax.types import PyTree

_PRETRAINED = Path(__file__).parent / "pretrained"
_PACKAGED = ("demo", "demo-robust")


def packaged() -> tuple[str, ...]:
    """Names of the encoders that ship with the package."""
    return _PACKAGED


def load_encoder(
    path: str | os.PathLike,
    name: str | None = None,
    representation: str = "paper",
    dtype: str = "float32",
    *,
    fold: bool = True,
    prefix: str | None = None,
) -> Encoder:
    """Loads an encoder with its weights.

    Args:
      path: a checkpoint directory that `experiments/convert_weights.py` made, a published file
        (`.pth`, `.pth.tar`, `.pt`, `.safetensors`), or "demo", which ships with the package.
      name: which encoder a published file holds, see `list_encoders`; a checkpoint knows its own.
      representation: "paper" (what the paper evaluates), "features" (what its linear probe
        reads), "backbone", "projection" (the whole published head) or another output.
      dtype: compute dtype, "float32" or "bfloat16".
      fold: fold BatchNorm into the convolutions, which is faster and equal but for rounding.
      prefix: for a file whose keys start otherwise than the published ones, e.g. "backbone.".

    Returns:
      The encoder. Loading other weights of the same network compiles nothing anew.

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      ImportError: if a file needs PyTorch and it is not installed.
      ValueError: for an unknown name or representation; for a damaged, malicious or ill-fitting
        file or checkpoint; for weights that are NaN or infinite.
    """
    variables, spec, config, _ = load_variables(path, name, prefix=prefix)
    if fold:
        variables = fold_batch_norm(variables)
    return _encoder(spec, _to_device(variables), config, representation, dtype, fold)


class Loaded(NamedTuple):
    """What a checkpoint or published file holds.

    Attributes:
      variables: {"params"[, "batch_stats"]} of NumPy arrays, BatchNorm unfolded.
      spec: the encoder.
      config: keyword arguments of its network.
      parts: {name: variables} of what training keeps beside it, see `EncoderSpec.parts`.
    """

    variables: PyTree
    spec: EncoderSpec
    config: dict[str, Any]
    parts: dict[str, PyTree]


def load_variables(
    path: str | os.PathLike, name: str | None = None, *, prefix: str | None = None
) -> Loaded:
    """Loads an encoder's variables, for training to go on from.

    Args:
      path, name, prefix: as in `load_encoder`.

    Raises:
      As `load_encoder`.
    """
    if name is not None and name not in ENCODERS:
        raise unknown_name("encoder", name, ENCODERS)
    location = os.fspath(path)
    if location in _PACKAGED:
        location = str(_PRETRAINED / location)
    if "://" in location or os.path.isdir(location):
        if prefix is not None:
            raise UserError(f"Expected no prefix for a checkpoint directory, got {prefix!r}.")
        return _restore(location, name)
    if os.path.exists(location):
        if name is None:
            valid = ", ".join(spec.name for spec in ENCODERS.values() if spec.rules)
            raise UserError(f"Expected the encoder's name with the file {path}; one of: {valid}.")
        spec = ENCODERS[name]
        variables, config, _, parts = torch_files.load_published(location, spec, prefix=prefix)
        return Loaded(variables, spec, config, parts)
    raise NotFoundError(_nothing_at(location))


def make_encoder(
    spec: EncoderSpec,
    variables: PyTree,
    config: Mapping[str, Any] | None = None,
    representation: str = "paper",
    dtype: str = "float32",
    *,
    fold: bool = True,
) -> Encoder:
    """Makes an encoder of a known network from its variables, such as those in training.

    Args:
      spec: the encoder, an entry of `ENCODERS`.
      variables: {"params"[, "batch_stats"]} with BatchNorm unfolded.
      config: keyword arguments of its network.
      representation: as in `load_encoder`.
      dtype: as in `load_encoder`.
      fold: as in `load_encoder`.

    Raises:
      ValueError: for an unknown representation or dtype, or weights that are NaN or infinite.
    """
    if fold:
        variables = fold_batch_norm(jax.tree.map(np.asarray, variables))
    return _encoder(spec, variables, config, representation, dtype, fold)


def abstract_encoder(name: str, representation: str = "paper", dtype: str = "float32") -> Encoder:
    """An encoder of full size whose parameters are shapes only, to compile without weights.

    Args:
      name: see `list_encoders`.
      representation: as in `load_encoder`.
      dtype: as in `load_encoder`.

    Raises:
      ValueError: for an unknown name or representation.
    """
    if name not in ENCODERS:
        raise unknown_name("encoder", name, ENCODERS)
    spec = ENCODERS[name]
    output = {"paper": spec.paper, "features": spec.features}.get(representation, representation)
    dimensions = representation_dimensions(spec)
    if output not in dimensions:
        raise unknown_name("representation", representation, ("paper", "features", *dimensions))
    network = spec.network(folded=True)
    image = jax.ShapeDtypeStruct((1, *spec.input_size, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), image)
    cast = lambda x: jax.ShapeDtypeStruct(
        x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    )
    return Encoder(
        params=jax.tree.map(cast, variables),
        apply_fn=NetworkFn(network, output),
        name=name,
        input_size=tuple(spec.input_size),
        preparation=spec.preparation,
        mean=tuple(spec.mean),
        std=tuple(spec.std),
        representation=representation,
        dimension=dimensions[output],
        dtype=dtype,
    )


def representation_dimensions(
    spec: EncoderSpec, config: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Returns {output of the encoder's network: its dimension}."""
    network = spec.network(folded=True, **config or {})
    images = jax.ShapeDtypeStruct((1, *spec.input_size, 3), jnp.float32)
    outputs, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), images)
    return {name: output.shape[-1] for name, output in outputs.items()}


def weights_hash(encoder: Encoder) -> str:
    """Returns the SHA-256 of an encoder's parameters as it uses them, for records."""
    return checkpoints.tree_hash(encoder.params)


def described(encoder: Encoder) -> dict[str, str]:
    """What identifies an encoder in a record: its name, output, dtype and weights."""
    return {
        "encoder": encoder.name,
        "representation": encoder.representation,
        "dtype": encoder.dtype,
        "weights_sha256": weights_hash(encoder),
    }


def _encoder(spec, variables, config, representation, dtype, fold) -> Encoder:
    """The encoder of variables that are folded already, if `fold`."""
    output = {"paper": spec.paper, "features": spec.features}.get(representation, representation)
    dimensions = representation_dimensions(spec, config)
    if output not in dimensions:
        raise unknown_name("representation", representation, ("paper", "features", *dimensions))
    return from_fn(
        NetworkFn(spec.network(folded=fold, **config or {}), output),
        variables,
        input_size=spec.input_size,
        name=spec.name,
        preparation=spec.preparation,
        mean=spec.mean,
        std=spec.std,
        representation=representation,
        dtype=dtype,
    )


def _to_device(tree: dict[str, Any]) -> dict[str, Any]:
    """Moves the arrays of a nested dict, emptying it: a large file is never in memory twice."""
    move = lambda node: _to_device(node) if isinstance(node, dict) else jax.device_put(node)
    return {name: move(tree.pop(name)) for name in list(tree)}


def _restore(path: str, name: str | None) -> Loaded:
    """What a checkpoint directory holds."""
    variables, metadata = checkpoints.restore_encoder(path)
    parts = variables.pop("training", {})
    stored = metadata["encoder"]
    if stored not in ENCODERS:
        raise unknown_name("encoder in checkpoint", stored, ENCODERS)
    if name not in (None, stored):
        raise UserError(f"Expected encoder {name!r}, but {path} holds {stored!r}; leave name out.")
    # JSON has no tuples, and the network must stay hashable.
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["config"].items()}
    torch_files.check_variables(variables, ENCODERS[stored], config, path)
    return Loaded(variables, ENCODERS[stored], config, parts)


def _nothing_at(path: str) -> str:
    """The message for a path where nothing is."""
    if path in ENCODERS:
        spec = ENCODERS[path]
        return (
            f"Encoder {path!r} does not ship with the package: fetch {spec.file_name} "
            f"({spec.url}) and pass it as path, with name={path!r}."
        )
    packaged = ", ".join(_PACKAGED)
    return (
        f"There is no checkpoint or file at {path}; expected an existing path, or an encoder that "
        f"ships with the package: {packaged}."
    )
