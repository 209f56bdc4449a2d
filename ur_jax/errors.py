"""Errors that name the bad value, what was expected and what to do.

A `UserError` is what a user can mend: a command ends with its message on one line, without a
traceback. Any other exception is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """Bad input; the message names the value, what was expected and what to do."""


class NotFoundError(UserError, FileNotFoundError):
    """There is nothing at a path."""

    __str__ = Exception.__str__  # an OSError's own would want an errno


class DamagedError(UserError):
    """A file that is not as it was written; `path` is the file."""

    def __init__(self, path, why: str, remedy: str):
        super().__init__(f"{path} is damaged: {why}. {remedy}")
        self.path = path


class MissingPackageError(UserError, ImportError):
    """A package that an extra of ours brings is not installed."""

    __str__ = Exception.__str__


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """Returns the error for a name that is not one of `valid`, suggesting near ones.

    Args:
      kind: what the name stands for, e.g. "metric".
      name: the name that was given.
      valid: every accepted name.

    Returns:
      A UserError to raise.
    """
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return UserError(f"Unknown {kind} {name!r}{hint} Expected one of: {', '.join(valid)}.")


def require(module: str, extra: str, what: str) -> ModuleType:
    """Imports a module that only some uses need.

    Args:
      module: its name, e.g. "matplotlib.figure".
      extra: the extra of ours that brings it.
      what: what needs it, for the message, e.g. "Drawing figures".

    Raises:
      MissingPackageError: if it is not installed, in one line that says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{what} needs {package}, which cannot be imported ({error}): "
            f'pip install "ur_jax[{extra}]".'
        ) from error
