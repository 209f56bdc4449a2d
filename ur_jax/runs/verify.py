"""Looks whether run folders are as they were written; changes nothing: `ur-jax verify FOLDER`.

Every JSON file, part and table below the folder is read and held against its checksum. Exit status
1 if something is damaged; `ur-jax repair FOLDER` sets that aside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from ur_jax.errors import DamagedError, NotFoundError, UserError
from ur_jax.runs import files
from ur_jax.runs.folder import read_part
from ur_jax.runs.summary import Summary


@dataclasses.dataclass(frozen=True)
class Config:
    """Which folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or a working directory of several."""


class Problem(NamedTuple):
    """A damaged file, and why."""

    path: Path
    reason: str


def main(config: Config) -> int:
    """Prints what is damaged; returns the exit status."""
    found = list(problems(config.folder))
    for path, reason in found:
        print(f"{path}: {reason}")
    print(f"{len(found)} damaged files in {config.folder}")
    return int(bool(found))


def problems(folder: Path) -> Iterator[Problem]:
    """Every damaged file below a folder, but those that were set aside.

    Raises:
      NotFoundError: if there is no such folder.
    """
    folder = files.as_folder(folder)
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {folder}; check the path.")
    for path in _files_below(folder):
        try:
            _check(path)
        except (UserError, OSError) as error:
            yield Problem(path, str(error).removeprefix(f"{path} is damaged: "))


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, of a file system or a bucket, but those that were set aside."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif path.name != "damaged":
            yield from _files_below(path)


def _check(path: Path) -> None:
    """Raises an error unless a file is as it was written."""
    if path.suffix == ".npz":
        read_part(path)
    elif path.name == "summary.json":
        for name in Summary.read(path).damaged_tables(path.parent):
            where, remedy = path.parent / name, "Repeat the command that made it."
            raise DamagedError(where, "it is not the table of summary.json", remedy)
    elif path.suffix == ".json":
        files.read_json(path)
