"""Reading from storage that may fail: a passing fault is tried again, then stops the run.

That a disk, a mount or a server does not answer says nothing about an image. Only content that does
not decode makes an image "unreadable", a property of it that a result may report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from PIL import UnidentifiedImageError

from ur_jax.errors import UserError

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0)
"""Seconds before the second, third and fourth try."""


class StorageError(UserError):
    """Something could not be read, though tried again: storage that is away, or no permission."""


class CorruptionError(RuntimeError):
    """What makes a probe's views failed, or gave no image: a fault of its code."""


NOT_THE_IMAGE = (StorageError, CorruptionError, MemoryError)
"""Errors that do not make the image that was read an unreadable one."""


def is_storage_fault(error: BaseException) -> bool:
    """Whether an error comes from the operating system, rather than from what was read.

    Pillow's own errors about content (a file that ends early, an unknown format) are `OSError` too,
    but carry no `errno`.
    """
    has_errno = isinstance(error, OSError) and error.errno is not None
    return has_errno and not isinstance(error, UnidentifiedImageError)


def retried(read: Callable[[], T], what: str) -> T:
    """Returns what `read` returns, tried up to four times if the operating system reports a fault.

    Args:
      read: reads something; may raise anything.
      what: what it reads, for the message: "a/1.png of 'folder:photos'".

    Raises:
      StorageError: if the last try failed too, or at once where permission is missing.
      Exception: whatever else `read` raises.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            if not is_storage_fault(error):
                raise
            if wait is None or isinstance(error, PermissionError):
                raise StorageError(
                    f"Cannot read {what}: {error.strerror or error}. What is finished is kept: "
                    "make it readable or take it out of the listing, then repeat the command."
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable")
