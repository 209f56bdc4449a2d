"""Ctrl-C while the package is imported, which takes seconds: one line instead of a traceback."""

from __future__ import annotations

import os
import sys
import traceback

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def _told(kind, error, trace) -> None:
    """Tells what ends a program as before, but for an interruption of an import of ours."""
    is_import = any(
        frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(_PACKAGE)
        for frame, _ in traceback.walk_tb(trace)
    )
    if is_import and any(isinstance(each, KeyboardInterrupt) for each in _causes(error)):
        print("interrupted. Nothing was begun.", file=sys.stderr)
    else:
        _before(kind, error, trace)


def _causes(error):
    """An error and what led to it: an interrupted extension fails to import."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_before, sys.excepthook = sys.excepthook, _told
