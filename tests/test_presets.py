"""A changed default shows up in a diff: every command's presets, as they are written in `presets/`.

python tests/test_presets.py        # writes them anew
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import pytest

from ur_jax import cli
from ur_jax.jobs import JOBS

PRESETS = pathlib.Path(__file__).parent / "presets"
NAMES = sorted((*JOBS, *cli._SCRIPTS))


def plain(value: Any) -> Any:
    """JSON of a configuration: dataclasses become objects, what has no default null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, str | int | float | bool | None) else None


def text(name: str) -> str:
    """A command's presets as JSON; without presets, its defaults."""
    command = cli.find(name)
    presets = command.presets
    if not presets:
        fields = dataclasses.fields(command.flags)
        known = {
            f.name: f.default_factory() if callable(f.default_factory) else f.default
            for f in fields
            if not (f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
        }
        presets = {"": known}
    return json.dumps(plain(dict(presets)), indent=1) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_those_on_record(name):
    assert text(name) == (PRESETS / f"{name}.json").read_text()


def test_none_is_left_over():
    assert {path.stem for path in PRESETS.iterdir()} == set(NAMES)


if __name__ == "__main__":
    for each in NAMES:
        (PRESETS / f"{each}.json").write_text(text(each))
