"""For a command in a process of its own: with this file as `--plugin`, checkpoints of "demo" are of
the network of `tiny_encoder`."""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tiny_encoder  # noqa: E402

_kept = tiny_encoder.stands_for_demo()
_kept.__enter__()
