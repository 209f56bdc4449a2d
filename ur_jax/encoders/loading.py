"""Encoders by name: from a checkpoint, a published file, this package, or one's own function.

What `load_encoder` takes is what every command takes as `--encoder`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.encoders import checkpoints, factories, torch_files
from ur_jax.encoders.base import Encoder, Origin, check_finite, from_fn
from ur_jax.encoders.identity import described as described
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
    factory: str | None = None,
) -> Encoder:
    """Loads an encoder with its weights.

    Args:
      path: a checkpoint directory that `ur-jax convert-weights`, training or `save_encoder` made; a
        published file (`.pth`, `.pth.tar`, `.pt`, `.safetensors`); "demo", which ships with the
        package; or a function of your own that returns an `Encoder`: "package.module:make" or
        "file.py:make", with arguments "file.py:make,width=64".
      name: which encoder a published file holds, see `list_encoders`; a checkpoint knows its own.
      representation: "paper" (what the paper evaluates), "features" (what its linear probe
        reads), "backbone", "projection" (the whole published head) or another output.
      dtype: compute dtype, "float32" or "bfloat16".
      fold: fold BatchNorm into the convolutions, which is faster and equal but for rounding.
      prefix: for a file whose keys start otherwise than the published ones, e.g. "backbone.".
      factory: for a checkpoint of an own encoder, the function that makes it, where it is no longer
        where it was when the checkpoint was saved.

    Returns:
      The encoder. Loading other weights of the same network compiles nothing anew.

    Raises:
      FileNotFoundError: if there is nothing at `path`.
      ImportError: if a file needs PyTorch and it is not installed.
      ValueError: for an unknown name or representation; for a damaged, malicious or ill-fitting
        file or checkpoint; for weights that are NaN or infinite.
    """
    location = os.fspath(path)
    if factories.is_place(location) and not os.path.exists(location):
        if name is not None:
            raise UserError(f"Expected no name with the function {location}, got {name!r}.")
        return factories.make(*factories.split_arguments(location), representation, dtype)
    location = _located(location)
    if _is_directory(location) and "own" in (metadata := checkpoints.read_metadata(location)):
        return _restore_own(location, metadata, representation, dtype, factory)
    if factory is not None:
        raise UserError(f"Expected a checkpoint of an own encoder with factory, got {path}.")
    variables, spec, config, _, folded = _load(location, name, prefix)
    if fold and not folded:
        variables = fold_batch_norm(variables)
    return _encoder(spec, _to_device(variables), config, representation, dtype, fold or folded)


def save_encoder(
    path: str | os.PathLike,
    encoder: Encoder,
    *,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Writes an encoder as a checkpoint directory, for `load_encoder`.

    The weights are kept, and how the function is made again: for a published encoder its name, for
    one's own the place of its factory, which must be there when it is loaded.

    Args:
      path: the directory to make; it must not exist.
      encoder: the encoder.
      factory: "package.module:make" or "file.py:make", a function that makes an encoder with the
        same parameters; by default the one that `load_encoder` made it with. Without either it can
        only be loaded with `load_encoder(path, factory=...)`.
      arguments: keyword arguments of the factory, JSON values.

    Raises:
      UserError: if something is at `path` already, or for a factory that is no place.
    """
    origin = encoder.origin
    if factory is not None:
        if not factories.is_place(factory):
            raise UserError(
                f"Expected factory as package.module:make or file.py:make, got {factory!r}."
            )
        place, given = factories.split_arguments(factory)
        origin = Origin(factories.lasting(place), {**given, **(arguments or {})})
    elif arguments is not None:
        raise UserError(f"Expected arguments only with a factory, got {arguments!r}.")
    if origin.place in ENCODERS:
        kept = {"encoder": origin.place, **origin.arguments}
        checkpoints.save_encoder(path, encoder.params, kept)
        return
    leaves = jax.tree_util.tree_leaves_with_path(encoder.params)
    names = [jax.tree_util.keystr(where, simple=True, separator="/") for where, _ in leaves]
    own = {
        "factory": origin.place,
        "arguments": dict(origin.arguments),
        "leaves": names,
        **{field: getattr(encoder, field) for field in _KEPT},
    }
    checkpoints.save_encoder(
        path,
        {f"leaf{number:05d}": leaf for number, (_, leaf) in enumerate(leaves)},
        {"encoder": encoder.name, "config": {}, "own": own},
    )


_KEPT = ("name", "input_size", "preparation", "mean", "std", "representation", "dtype")
"""What a checkpoint of an own encoder keeps beside its weights."""


def _restore_own(
    path: str, metadata: Mapping[str, Any], representation: str, dtype: str, factory: str | None
) -> Encoder:
    """The encoder of one's own whose weights a checkpoint has."""
    own = metadata["own"]
    if representation in factories.DEFAULT_REPRESENTATIONS:
        representation = own["representation"]
    if factory is None:
        made = factories.remake(
            Origin(own["factory"], own["arguments"]), representation, dtype, path
        )
    else:
        place, arguments = factories.split_arguments(factory)
        made = factories.make(place, arguments or own["arguments"], representation, dtype)
    stored, _ = checkpoints.restore_encoder(path)
    places, structure = jax.tree_util.tree_flatten_with_path(made.params)
    expected = {
        jax.tree_util.keystr(where, simple=True, separator="/"): leaf for where, leaf in places
    }
    have = dict(zip(own["leaves"], (stored[key] for key in sorted(stored)), strict=True))
    torch_files.check_arrays(have, expected, f"{path} does not fit what {made.origin.place} makes")
    leaves = [jnp.asarray(have[name], leaf.dtype) for name, leaf in expected.items()]
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items() if k in _KEPT}
    kept |= {"representation": made.representation, "dtype": made.dtype}
    encoder = made.replace(params=structure.unflatten(leaves), **kept)
    check_finite(encoder.params, encoder.name)
    return encoder


class Loaded(NamedTuple):
    """What a checkpoint or published file holds.

    Attributes:
      variables: {"params"[, "batch_stats"]} of NumPy arrays, BatchNorm unfolded.
      spec: the encoder.
      config: keyword arguments of its network.
      parts: {name: variables} of what training keeps beside it, see `EncoderSpec.parts`.
      folded: whether BatchNorm is folded into the convolutions after all.
    """

    variables: PyTree
    spec: EncoderSpec
    config: dict[str, Any]
    parts: dict[str, PyTree]
    folded: bool = False


def load_variables(
    path: str | os.PathLike, name: str | None = None, *, prefix: str | None = None
) -> Loaded:
    """Loads an encoder's variables, for training to go on from.

    Args:
      path, name, prefix: as in `load_encoder`.

    Raises:
      As `load_encoder`.
    """
    if is_own(path):
        raise UserError(
            f"Expected a published encoder or one trained here, got one of your own, {path}, whose "
            "parameters are known to its own function only."
        )
    loaded = _load(_located(os.fspath(path)), name, prefix)
    if loaded.folded:
        raise UserError(
            f"The checkpoint {path} has its BatchNorm folded into the convolutions, which training "
            "cannot go on from; save an encoder that was loaded with fold=False."
        )
    return loaded


def is_loadable(path: str | os.PathLike) -> bool:
    """Whether there is something that `load_encoder` may take: a path, a place, or what ships."""
    location = os.fspath(path)
    return (
        location in _PACKAGED
        or "://" in location
        or os.path.exists(location)
        or factories.is_place(location)
    )


def is_own(path: str | os.PathLike) -> bool:
    """Whether what `load_encoder` takes names a user's own function, or a checkpoint of one's."""
    location = os.fspath(path)
    if not os.path.exists(location) and factories.is_place(location):
        return True
    location = _located(location)
    return _is_directory(location) and "own" in checkpoints.read_metadata(location)


def _located(location: str) -> str:
    """Where an encoder lies; the name of one that ships stands for its folder."""
    return str(_PRETRAINED / location) if location in _PACKAGED else location


def _is_directory(location: str) -> bool:
    """Whether it is to be read as a checkpoint directory."""
    return "://" in location or os.path.isdir(location)


def _load(location: str, name: str | None, prefix: str | None) -> Loaded:
    """The variables in a checkpoint directory or a published file."""
    if name is not None and name not in ENCODERS:
        raise unknown_name("encoder", name, ENCODERS)
    if _is_directory(location):
        if prefix is not None:
            raise UserError(f"Expected no prefix for a checkpoint directory, got {prefix!r}.")
        return _restore(location, name)
    if os.path.exists(location):
        if location.endswith(".py"):
            raise UserError(
                f"Expected the function in {location} that makes the encoder: {location}:make."
            )
        if name is None:
            valid = ", ".join(spec.name for spec in ENCODERS.values() if spec.rules)
            raise UserError(
                f"Expected the encoder's name with the file {location}; one of: {valid}."
            )
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
      name: see `list_encoders`, whose weights are not needed; or what `load_encoder` takes.
      representation: as in `load_encoder`.
      dtype: as in `load_encoder`.

    Raises:
      UserError: for an unknown name or representation.
    """
    if name not in ENCODERS:
        if not is_loadable(name):
            raise unknown_name("encoder", name, ENCODERS)
        encoder = load_encoder(name, None, representation, dtype)
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        return encoder.replace(params=jax.tree.map(shape, encoder.params))
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


def _encoder(spec, variables, config, representation, dtype, fold) -> Encoder:
    """The encoder of variables that are folded already, if `fold`."""
    output = {"paper": spec.paper, "features": spec.features}.get(representation, representation)
    dimensions = representation_dimensions(spec, config)
    if output not in dimensions:
        raise unknown_name("representation", representation, ("paper", "features", *dimensions))
    encoder = from_fn(
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
    kept = {"config": dict(config or {}), "folded": fold}
    return encoder.replace(origin=Origin(spec.name, kept))


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
    spec, folded = ENCODERS[stored], metadata.get("folded", False)
    torch_files.check_variables(variables, spec, config, path, folded=folded)
    return Loaded(variables, spec, config, parts, folded)


def _nothing_at(path: str) -> str:
    """The message for a path where nothing is."""
    if path.endswith(".py"):
        return (
            f"There is no file {path}; check the path of the file whose function makes the encoder."
        )
    if path in ENCODERS:
        spec = ENCODERS[path]
        return (
            f"Encoder {path!r} does not ship with the package: fetch {spec.file_name} "
            f"({spec.url}) and pass it as path, with name={path!r}."
        )
    packaged = ", ".join(_PACKAGED)
    return (
        f"There is no checkpoint or file at {path}; expected an existing path, a function of "
        f"your own as file.py:make, or an encoder that ships with the package: {packaged}."
    )
