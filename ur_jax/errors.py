"""Errors that name the bad value, what was expected and what to do.

A `UserError` is what a user can mend: a command ends with its message on one line, without a
traceback. Any other exception is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class UserError(ValueError):
    """Bad input; the message names the value, what was expected and what to do."""


class NotFoundError(UserError, FileNotFoundError):
    """There is nothing at a path."""

    __str__ = Exception.__str__  # an OSError's own would want an errno


class DamagedError(UserError):
    """A file that is not as it was written; `path` is the file."""

    def __init__(self, path, why: str, remedy: str):
        super().__init__(f"{path} is damaged: {why.rstrip('.')}. {remedy}")
        self.path = path


class MissingPackageError(UserError, ImportError):
    """A package that an extra of ours brings is not installed."""

    __str__ = Exception.__str__


_SPACE = "make room there, or name another folder"
_RIGHTS = "name a folder that you may write, or change its permissions"
_AWAY = "the disk or the connection to it failed: see that it is back"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EROFS: "name a folder on a disk that can be written",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOTDIR: "a file stands where a folder is to be; name another place",
    errno.EISDIR: "a folder stands where a file is to be; name another place",
    errno.EEXIST: "it is in the way; name another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links go round in a circle; name another place",
    errno.EIO: _AWAY,
    errno.ESTALE: _AWAY,
    errno.ENOTCONN: _AWAY,
    errno.EHOSTDOWN: _AWAY,
    errno.ETIMEDOUT: _AWAY,
    errno.ENODEV: _AWAY,
    errno.ENXIO: _AWAY,
    errno.EMFILE: "raise the limit (`ulimit -n`) or give fewer --num-workers",
    errno.ENFILE: "close other programs or give fewer --num-workers",
    errno.EAGAIN: "give fewer --num-workers",
    errno.ENOMEM: "give fewer --num-workers or a smaller batch",
}
"""{errno: what to do}: of a place or a machine, not of this program."""


def remedy_of(error: BaseException | None) -> str | None:
    """What to do about an error of the place of the results, or of the machine: a full disk, say.

    Whatever else is tried there fails too. None for any other error: a file that is missing where
    this program expects it is a fault of ours.
    """
    if not isinstance(error, OSError) or isinstance(error, UserError) or error.errno is None:
        return None
    return _REMEDIES.get(error.errno)


def shown(value: Any) -> str:
    """A value on one line, of 80 characters at most, for a message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:76]} ..."


class Stop(KeyboardInterrupt):
    """SIGTERM: whoever started this process wants it to end; no `except Exception` takes it."""


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
    near = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
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
