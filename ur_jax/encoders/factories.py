"""Encoders of one's own: made by a function of the user's, named by its place.

    load_encoder("my_package.models:make")        # of an installed package, or the current folder
    load_encoder("my_file.py:make,width=64")      # of a file, with arguments

`make()` returns an `Encoder`, as `from_fn`, `from_linen` and `from_nnx` do. If it takes arguments
named `representation` and `dtype`, those of the command line are passed on.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ur_jax.encoders import checkpoints, mapping
from ur_jax.encoders.base import Encoder, Origin, check_finite
from ur_jax.errors import UserError
from ur_jax.registry import import_object

DEFAULT_REPRESENTATIONS = ("paper", "features")
"""What an own encoder gives without being asked for a representation."""


def is_place(text: str) -> bool:
    """Whether a text has the form of a function's place: module:name or file.py:name[,...]."""
    module, _, name = text.partition(",")[0].rpartition(":")
    return name.isidentifier() and (
        module.endswith(".py") or all(part.isidentifier() for part in module.split("."))
    )


def split_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """Splits "file.py:make,width=64,stem=cifar" into the place and the arguments.

    Values are Python literals; what is none is text.

    Raises:
      UserError: for an argument that is not name=value.
    """
    place, *words = text.split(",")
    arguments = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise UserError(
                f"Expected arguments as name=value after {place!r}, got {word!r}; separate them "
                "with commas."
            )
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return place, arguments


def make(
    place: str,
    arguments: Mapping[str, Any],
    representation: str = "paper",
    dtype: str = "float32",
) -> Encoder:
    """Makes the encoder of a place.

    Args:
      place: "package.module:make" or "file.py:make".
      arguments: keyword arguments.
      representation: passed on if the function takes it; "paper" and "features" are what it gives
        by itself.
      dtype: passed on if the function takes it and it is not "float32".

    Raises:
      UserError: for a place where there is no such function, a representation or dtype that it
        does not make, or a result that is no encoder.
    """
    function = import_object(place)
    if not callable(function):
        raise UserError(f"Expected a function at {place}, got {type(function).__name__}.")
    wanted = {} if representation in DEFAULT_REPRESENTATIONS else {"representation": representation}
    if dtype != "float32":
        wanted["dtype"] = dtype
    encoder = _called(function, place, arguments, wanted)
    if not isinstance(encoder, Encoder):
        raise UserError(
            f"Expected {place} to return an Encoder, got {type(encoder).__name__}; return "
            "ur_jax.from_fn(...), from_linen(...) or from_nnx(...)."
        )
    made = {"representation": encoder.representation, "dtype": encoder.dtype}
    for name, value in {**wanted, "dtype": dtype}.items():
        if made[name] != value:
            raise UserError(
                f"Expected {place} to make an encoder of {name} {value!r}, got {made[name]!r}; "
                f"have it take {name} and pass it on to from_fn, or ask for {made[name]!r}."
            )
    return encoder.replace(origin=Origin(lasting(place), dict(arguments)))


def _called(
    function: Callable, place: str, arguments: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Any:
    """What the function returns; refuses arguments that it does not take.

    What is `wanted` is passed on if it takes it.
    """
    try:
        takes = inspect.signature(function).parameters.values()
    except ValueError:  # of C
        return function(**arguments, **wanted)
    names = [p.name for p in takes if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = {**arguments, **wanted}
    if not any(p.kind == p.VAR_KEYWORD for p in takes):
        given = {k: v for k, v in given.items() if k in names}
        if unknown := [name for name in arguments if name not in names]:
            raise UserError(
                f"{place} takes no argument {unknown[0]!r}, but "
                f"{', '.join(names) or 'no arguments at all'}."
            )
    needed = [p.name for p in takes if p.default is p.empty and p.name in names]
    if missing := [name for name in needed if name not in given]:
        raise UserError(
            f"{place} needs {', '.join(missing)}; give it as {place},{missing[0]}=VALUE, or a "
            "default."
        )
    return function(**given)


def lasting(place: str) -> str:
    """A place that holds in another folder of this machine, too."""
    module, _, name = place.rpartition(":")
    if not module.endswith(".py"):
        return place
    return f"{os.path.abspath(os.path.expanduser(module))}:{name}"


def _remake(
    origin: Origin, representation: str, dtype: str, checkpoint: str | os.PathLike
) -> Encoder:
    """Makes the encoder that a checkpoint's weights belong to.

    Args:
      origin: what the checkpoint says.
      representation, dtype: as `make`.
      checkpoint: its path, for errors.

    Raises:
      UserError: if the function is not on this machine, or as `make`.
    """
    what = f"The checkpoint {checkpoint} holds the weights of an encoder of one's own"
    remedy = "give its place: load_encoder(PATH, factory='file.py:make')"
    if origin.place is None:
        raise UserError(f"{what}, and was saved without the function that makes it; {remedy}.")
    module, _, name = origin.place.rpartition(":")
    here, place = os.path.basename(module), origin.place
    if module.endswith(".py") and not os.path.isfile(module):
        place = f"{here}:{name}"  # the file may have come along to the current folder
    try:
        function = import_object(place)
    except UserError as error:
        bring = f"bring {here} to this folder" if module.endswith(".py") else f"install {module}"
        raise UserError(
            f"{what}, which {origin.place} makes, and that is not here ({error}) {bring}, or "
            f"{remedy}."
        ) from error
    if not _knows_us(sys.modules.get(getattr(function, "__module__", ""))):
        # A checkpoint from elsewhere must not have any function of this machine called.
        raise UserError(f"{what}, but {place} is of a module that does not use ur_jax; {remedy}.")
    return make(place, origin.arguments, representation, dtype)


def _knows_us(module: ModuleType | None) -> bool:
    """Whether a module has imported something of this package."""
    values = vars(module).values() if module else ()
    names = (getattr(v, "__module__", None) or getattr(v, "__name__", "") for v in values)
    return any(str(name).partition(".")[0] == "ur_jax" for name in names)


def save(
    path: str | os.PathLike,
    encoder: Encoder,
    origin: Origin,
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes an own encoder as a checkpoint directory, see `loading.save_encoder`."""
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
        {**metadata, "encoder": encoder.name, "config": {}, "own": own},
        overwrite=overwrite,
    )


_KEPT = ("name", "input_size", "preparation", "mean", "std", "representation", "dtype")
"""What a checkpoint of an own encoder keeps beside its weights."""


def restore(path: str, representation: str, dtype: str, factory: str | None) -> Encoder:
    """The own encoder whose weights a checkpoint has, see `loading.load_encoder`."""
    stored, metadata = checkpoints.restore_encoder(path)
    own = metadata["own"]
    if representation in DEFAULT_REPRESENTATIONS:
        representation = own["representation"]
    if factory is None:
        made = _remake(Origin(own["factory"], own["arguments"]), representation, dtype, path)
    else:
        place, arguments = split_arguments(factory)
        made = make(place, arguments or own["arguments"], representation, dtype)
    places, structure = jax.tree_util.tree_flatten_with_path(made.params)
    expected = {
        jax.tree_util.keystr(where, simple=True, separator="/"): leaf for where, leaf in places
    }
    have = dict(zip(own["leaves"], (stored[key] for key in sorted(stored)), strict=True))
    mapping.check_arrays(have, expected, f"{path} does not fit what {made.origin.place} makes")
    leaves = [jnp.asarray(have[name], leaf.dtype) for name, leaf in expected.items()]
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items() if k in _KEPT}
    kept |= {"representation": made.representation, "dtype": made.dtype}
    encoder = made.replace(params=structure.unflatten(leaves), **kept)
    check_finite(encoder.params, encoder.name)
    return encoder
