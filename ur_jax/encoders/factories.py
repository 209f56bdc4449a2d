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

from ur_jax.encoders.base import Encoder, Origin
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
    encoder = _called(function, place, {**arguments, **wanted}, wanted)
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


def _called(function: Callable, place: str, given: Mapping[str, Any], wanted: Mapping) -> Any:
    """What the function returns; refuses arguments that it does not take."""
    try:
        takes = inspect.signature(function).parameters.values()
    except ValueError:  # of C
        return function(**given)
    names = [p.name for p in takes if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not any(p.kind == p.VAR_KEYWORD for p in takes):
        for name, value in given.items():
            if name not in names:
                what = f"{name} {value!r}" if name in wanted else f"an argument {name!r}"
                raise UserError(
                    f"{place} makes no encoder of {what}: it takes "
                    f"{', '.join(names) or 'no arguments'}."
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


def remake(
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
