"""The fields of a configuration have the types that they declare; one line says where not.

    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: tuple[int, ...] = (1, 2)

        def __post_init__(self):
            check_types(self)              # Config(steps=3): Expected steps to be a tuple of ...

Whoever writes Python, and not a command line, may give anything: what is accepted here means what
it says. An integer is a number; a bool is neither, nor is what 64 bits do not hold; a list is no
tuple, since a configuration must have a hash. Types that are not plain (functions, protocols) are
not looked at.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import numbers
import os
import pathlib
import types
import typing
from typing import Any

import numpy as np

from ur_jax.errors import UserError, shown, unknown_name

_PLAIN: dict[Any, tuple[Any, str]] = {
    bool: ((bool, np.bool_), "True or False"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
    pathlib.Path: (os.PathLike, "a path"),
    type(None): (type(None), "None"),
}


def check_types(config: Any, *, but: tuple[Any, ...] = ()) -> None:
    """Raises UserError unless each field of a dataclass is of the type that it declares.

    Args:
      config: an instance.
      but: values that stand for none, such as a parser's for a flag that has to be given.
    """
    for field, kind in _kinds(type(config)).items():
        value = getattr(config, field)
        if any(value is each for each in but) or fits(value, kind):
            continue
        if names := _names(kind):
            wrong = value if isinstance(value, tuple) else (value,)
            for name in wrong:
                if isinstance(name, str) and name not in names:
                    raise unknown_name(field, name, names)
        raise UserError(f"Expected {field} to be {words(kind)}, got {shown(value)}.")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; of a type that is not plain, always."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is typing.Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(fits(each, inner[0]) for each in value)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping)
    if kind in _PLAIN:
        wanted = _PLAIN[kind][0]
        if not isinstance(value, wanted) or (kind is not bool and isinstance(value, bool)):
            return False
        return not isinstance(value, numbers.Integral) or -(2**63) <= int(value) < 2**63
    if kind is not Any and inspect.isclass(kind):
        is_protocol = getattr(kind, "_is_protocol", False)
        if not is_protocol or getattr(kind, "_is_runtime_protocol", False):
            return isinstance(value, kind)
    return True


def words(kind: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(words, inner)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return f"a tuple, each of it {words(inner[0])}"
    if origin is tuple:
        return f"a tuple of {len(inner)}: {', '.join(map(words, inner))}"
    if kind in _PLAIN:
        return _PLAIN[kind][1]
    name = getattr(origin or kind, "__name__", str(kind))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _names(kind: Any) -> tuple[str, ...]:
    """The texts that a type allows, alone or several in a tuple; () of any other type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return _names(inner[0])
    return (
        tuple(each for each in inner if isinstance(each, str)) if origin is typing.Literal else ()
    )


@functools.cache
def _kinds(config: type) -> dict[str, Any]:
    """{field: its type} of a dataclass."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}
