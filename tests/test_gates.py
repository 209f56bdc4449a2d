"""Style, layout and types of the whole tree, as `.ci/run` wants them."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def tool(name: str) -> str:
    """A program of this environment."""
    found = shutil.which(name, path=str(pathlib.Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed: it comes with the extra test")


@pytest.mark.parametrize(
    "command",
    [("ruff", "check"), ("ruff", "format", "--check"), ("pyright", "--pythonpath", sys.executable)],
    ids=" ".join,
)
def test_no_remark(command):
    done = subprocess.run(
        [tool(command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
