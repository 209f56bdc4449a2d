"""Errors that name the bad value, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> ValueError:
    """Returns the error for a name that is not one of `valid`, suggesting near ones.

    Args:
      kind: what the name stands for, e.g. "metric".
      name: the name that was given.
      valid: every accepted name.

    Returns:
      A ValueError to raise.
    """
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ValueError(f"Unknown {kind} {name!r}{hint} Expected one of: {', '.join(valid)}.")
