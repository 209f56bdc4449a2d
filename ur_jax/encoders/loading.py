"""Encoders by name: from a checkpoint, a published file, this package, or one's own function.

What `load_encoder` takes is what every command takes as `--encoder`.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.encoders import checkpoints, factories, mapping
from ur_jax.encoders.base import Encoder, Origin, from_fn
from ur_jax.encoders.bridge import checkpoint as bridge_checkpoint
from ur_jax.encoders.bridge import places
from ur_jax.encoders.bridge.function import GraphFn
from ur_jax.encoders.identity import described as described
from ur_jax.encoders.networks.layers import fold_batch_norm
from ur_jax.encoders.networks.network import NetworkFn
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.encoders.zoo.spec import EncoderSpec
from ur_jax.errors import NotFoundError, UserError, unknown_name
from ur_jax.types import PyTree

_PRETRAINED = Path(__file__).parent / "pretrained"
_PACKAGED = ("demo", "demo-robust")
_SHIPPED = (*_PACKAGED, "demo-robust-v1")  # and those whose numbers are quoted


def packaged() -> tuple[str, ...]:
    """Names of the encoders that ship with the package, without earlier versions."""
    return _PACKAGED


def load_encoder(
    path: str | os.PathLike,
    name: str | None = None,
    representation: str = "paper",
    dtype: str = "float32",
    *,
    fold: bool = True,
    prefix: str | None = None,
    group: str | None = None,
    factory: str | None = None,
) -> Encoder:
    """Loads an encoder with its weights.

    Args:
      path: a checkpoint directory that `ur-jax convert-weights`, training or `save_encoder` made; a
        published file (`.pth`, `.pth.tar`, `.pt`, `.safetensors`); "demo", which ships with the
        package; a function of your own that returns an `Encoder`: "package.module:make" or
        "file.py:make", with arguments "file.py:make,width=64"; or a network of PyTorch,
        "torch:file.py:make", "timm:NAME", "hf:DIRECTORY", see `bridge.places`.
      name: which encoder a published file holds, see `list_encoders`; a checkpoint knows its own.
      representation: "paper" (what the paper evaluates), "features" (what its linear probe
        reads), "backbone", "projection" (the whole published head) or another output.
      dtype: compute dtype, "float32" or "bfloat16".
      fold: fold BatchNorm into the convolutions, which is faster and equal but for rounding; of a
        network of PyTorch see `from_torch`.
      prefix: for a file whose keys start otherwise than the published ones, e.g. "backbone.".
      group: the entry of a file that holds the weights, where it has several.
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
    if places.is_place(location):
        if name is not None:
            raise UserError(f"Expected no name with the network {location}, got {name!r}.")
        return places.load(location, representation, dtype, fold=fold)
    if factories.is_place(location) and not os.path.exists(location):
        if name is not None:
            raise UserError(f"Expected no name with the function {location}, got {name!r}.")
        return factories.make(*factories.split_arguments(location), representation, dtype)
    location = _located(location)
    if (kind := _kind(location)) == "own":
        return factories.restore(location, representation, dtype, factory)
    if kind == "bridge" and factory is None:
        return bridge_checkpoint.restore(location, representation, dtype)
    if factory is not None:
        raise UserError(f"Expected a checkpoint of an own encoder with factory, got {path}.")
    variables, spec, config, _, folded = _load(location, name, prefix, group, representation)
    if fold and not folded:
        variables = fold_batch_norm(variables)
    return _encoder(spec, _to_device(variables), config, representation, dtype, fold or folded)


def save_encoder(
    path: str | os.PathLike,
    encoder: Encoder,
    *,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes an encoder as a checkpoint directory, for `load_encoder`.

    The weights are kept, and how the function is made again: for a published encoder its name, for
    one's own the place of its factory, which must be there when it is loaded.

    Args:
      path: the directory to make.
      encoder: the encoder.
      factory: "package.module:make" or "file.py:make", a function that makes an encoder with the
        same parameters; by default the one that `load_encoder` made it with. Without either it can
        only be loaded with `load_encoder(path, factory=...)`.
      arguments: keyword arguments of the factory, JSON values.
      overwrite: replace a checkpoint that is there already.
      metadata: JSON data to keep with it, such as how it was trained.

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
        kept = {**(metadata or {}), "encoder": origin.place, **origin.arguments}
        checkpoints.save_encoder(path, encoder.params, kept, overwrite=overwrite)
        return
    if isinstance(encoder.apply_fn, GraphFn) and factory is None:
        bridge_checkpoint.save(path, encoder, metadata or {}, overwrite=overwrite)
        return
    factories.save(path, encoder, origin, metadata or {}, overwrite=overwrite)


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

    def __repr__(self) -> str:
        return f"Loaded({self.spec!r}, {self.config}, parts {sorted(self.parts)})"


def load_variables(
    path: str | os.PathLike,
    name: str | None = None,
    *,
    prefix: str | None = None,
    group: str | None = None,
) -> Loaded:
    """Loads an encoder's variables, for training to go on from.

    Args:
      path, name, prefix, group: as in `load_encoder`.

    Raises:
      As `load_encoder`.
    """
    if is_own(path):
        raise UserError(
            f"Expected a published encoder or one trained here, got one of your own, {path}, whose "
            "parameters are known to its own function only."
        )
    loaded = _load(_located(os.fspath(path)), name, prefix, group)
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
        location in _SHIPPED
        or "://" in location
        or os.path.exists(location)
        or factories.is_place(location)
        or places.is_place(location)
    )


def is_own(path: str | os.PathLike) -> bool:
    """Whether what `load_encoder` takes names a user's own function, or a checkpoint of one's."""
    location = os.fspath(path)
    if places.is_place(location):
        return True
    if not os.path.exists(location) and factories.is_place(location):
        return True
    return _kind(_located(location)) in ("own", "bridge")


def _located(location: str) -> str:
    """Where an encoder lies; the name of one that ships stands for its folder."""
    return str(_PRETRAINED / location) if location in _SHIPPED else location


def _is_directory(location: str) -> bool:
    """Whether it is to be read as a checkpoint directory."""
    return "://" in location or os.path.isdir(location)


def _kind(location: str) -> str | None:
    """Whose network a checkpoint holds: "own", "bridge" of PyTorch, or None of one known here."""
    if not _is_directory(location):
        return None
    metadata = checkpoints.read_metadata(location)
    return next((kind for kind in ("own", "bridge") if kind in metadata), None)


def _load(
    location: str,
    name: str | None,
    prefix: str | None,
    group: str | None,
    representation: str | None = None,
) -> Loaded:
    """The variables in a checkpoint directory or a published file; those of one representation."""
    if name is not None and name not in ENCODERS:
        raise unknown_name("encoder", name, ENCODERS)
    if _is_directory(location):
        if prefix is not None:
            raise UserError(f"Expected no prefix for a checkpoint directory, got {prefix!r}.")
        if group is not None:
            raise UserError(f"Expected no group for a checkpoint directory, got {group!r}.")
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
        return _load_file(location, ENCODERS[name], prefix, group, representation)
    raise NotFoundError(_nothing_at(location))


def _load_file(
    location: str,
    spec: EncoderSpec,
    prefix: str | None,
    group: str | None,
    representation: str | None,
) -> Loaded:
    """The variables in a published file; where only the backbone is needed, it may have no head."""
    load = functools.partial(mapping.load_published, location, prefix=prefix, group=group)
    try:
        published = load(spec)
    except UserError as error:
        if representation is None or _output(spec, representation) != "backbone":
            raise
        spec = spec.without_head()
        try:
            published = load(spec)
        except UserError:
            raise error from None  # of the whole file: it says more
    return Loaded(published.variables, spec, published.config, published.parts)


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
    output, dimensions = _output(spec, representation), representation_dimensions(spec)
    if output not in dimensions:
        raise unknown_name("representation", representation, (*_NAMED, *dimensions))
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
        input_size=spec.input_size,
        preparation=spec.preparation,
        mean=spec.mean,
        std=spec.std,
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
    output = _output(spec, representation)
    dimensions = representation_dimensions(spec, config)
    if output not in dimensions:
        named = [name for name in _NAMED if _output(spec, name) in dimensions]
        raise unknown_name("representation", representation, (*named, *dimensions))
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
    kept = {"config": dict(config or {}), "folded": fold, "head": spec.has_head}
    return encoder.replace(origin=Origin(spec.name, kept))


_NAMED = ("paper", "features")
"""Representations that stand for an output of each network."""


def _output(spec: EncoderSpec, representation: str) -> str:
    """The output of a network that a representation names."""
    return getattr(spec, representation) if representation in _NAMED else representation


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
    if not metadata.get("head", True):
        spec = spec.without_head()
    mapping.check_variables(variables, spec, config, path, folded=folded)
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
    near = difflib.get_close_matches(path, (*_SHIPPED, *ENCODERS), n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else "."
    return (
        f"There is no checkpoint or file at {path}{hint} Expected an existing path, a function of "
        f"your own as file.py:make, or an encoder that ships with the package: {packaged}."
    )
