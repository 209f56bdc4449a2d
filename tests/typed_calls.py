"""Shapes of public functions, checked whenever a test calls one.

A call whose shapes are not those of the signature fails, unless the function itself refuses it:
what the types refuse, the checks at the entry must refuse too, in a line that a user understands.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import typing
from collections.abc import Iterator
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

PACKAGES = (
    "ur_jax.attacks",
    "ur_jax.certify",
    "ur_jax.distances",
    "ur_jax.encoders.base",
    "ur_jax.metrics",
)


def install() -> None:
    """Has the modules of `PACKAGES` checked from their import on."""
    loaded = [name for name in sys.modules if name.startswith(PACKAGES)]
    assert not loaded, f"imported before they could be checked: {loaded}"
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in PACKAGES):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        for name, value in list(vars(module).items()):
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value):
                if "__call__" in vars(value):
                    value.__call__ = checked(value.__call__)
            elif callable(value):
                setattr(module, name, checked(value))


def checked(function: Any) -> Any:
    """A function whose shapes are checked; itself if its signature has none."""
    inner = inspect.unwrap(function)
    if not inspect.isfunction(inner):
        return function
    hints = {k: v for k, v in typing.get_type_hints(inner).items() if _has_shape(v)}
    if not hints:
        return function

    @functools.wraps(function)
    def plain(*args, **kwargs):
        return function(*args, **kwargs)

    signature = inspect.signature(inner)
    parameters = [
        p.replace(annotation=hints.get(p.name, Any)) for p in signature.parameters.values()
    ]
    plain.__signature__ = signature.replace(
        parameters=parameters, return_annotation=hints.get("return", Any)
    )
    typed = jaxtyped(plain, typechecker=beartype)

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return typed(*args, **kwargs)
        except TypeCheckError as error:
            result = function(*args, **kwargs)  # raises, if it is bad input that is refused
            if isinstance(result, Iterator):  # which refuses where it takes what is bad
                return _then_raise(result, error)
            raise

    return call


def _then_raise(items: Iterator, error: TypeCheckError) -> Iterator:
    yield from items
    raise error


def _has_shape(hint: Any) -> bool:
    """Whether a type is an array with axes, or made of some."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in typing.get_args(hint))
