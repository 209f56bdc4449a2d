"""The folder of one run: claimed by one configuration, resumed part by part.

It holds `config.json` (what it computes; another configuration is refused), `parts/` (what is
finished so far) and, at the end, its tables and `summary.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ur_jax.errors import DamagedError, UserError
from ur_jax.runs import files
from ur_jax.runs.files import as_folder, atomic_path, read_json, write_json

_CHECKSUM = "sha256"


class OtherConfigurationError(UserError):
    """A folder holds the results of another configuration."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of one run.

    Attributes:
      path: the folder; made, and claimed by `config.json`, by `open_run`.
    """

    path: Path

    def part(self, stage: str, number: int) -> Path:
        """The file of one finished part of a stage."""
        return self.path / "parts" / stage / f"{number:06d}.npz"

    def has_part(self, stage: str, number: int) -> bool:
        """Whether a part is finished."""
        return self.part(stage, number).exists()

    def num_parts(self, stage: str) -> int:
        """How many parts of a stage are finished, counted from the first without a gap."""
        folder = self.path / "parts" / stage
        # One listing: of a bucket, each question takes a while.
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        return next(n for n in itertools.count() if self.part(stage, n).name not in names)

    def write_part(self, stage: str, number: int, arrays: Mapping[str, Any]) -> None:
        """Writes one finished part, atomically, with its own SHA-256."""
        plain = {name: np.asarray(value) for name, value in arrays.items()}
        with atomic_path(self.part(stage, number)) as temporary, open(temporary, "wb") as file:
            arrays_of_file: dict[str, Any] = plain | {_CHECKSUM: np.array(_hash(plain))}
            np.savez(file, **arrays_of_file)

    def read_parts(self, stage: str) -> dict[str, np.ndarray]:
        """All finished parts of a stage, joined along the leading axis; {} if there are none.

        What only some of them have, of another version, is left out.

        Raises:
          DamagedError: for a part that is not as it was written; it names the file.
        """
        parts = [read_part(self.part(stage, n)) for n in range(self.num_parts(stage))]
        names = [n for n in (parts[0] if parts else ()) if all(n in part for part in parts)]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}


def read_part(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one part.

    Raises:
      DamagedError: for a file that is not as it was written.
    """
    remedy = "Repeat the command that made it: the part is computed again."
    with path.open("rb") as file:
        try:
            with np.load(file) as content:
                arrays = dict(content)
        except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds
            raise DamagedError(path, f"{type(error).__name__}: {error}", remedy) from error
    # Checksums of a zip file's members do not tell that one of them is gone from its list.
    if _CHECKSUM not in arrays or str(arrays.pop(_CHECKSUM)) != _hash(arrays):
        raise DamagedError(path, "it does not have its recorded SHA-256", remedy)
    return arrays


def set_aside(path: Path) -> Path:
    """Moves a damaged file of a run into a folder `damaged` beside it; returns where it is now."""
    place, number = path.parent / "damaged" / path.name, 1
    while place.exists():
        place, number = place.with_name(f"{path.name}.{number}"), number + 1
    files.move(path, place)
    return place


def open_run(path: str | os.PathLike, config: Any) -> Run:
    """Opens the folder of a run, or claims a new one.

    Args:
      path: the folder.
      config: what determines the results: JSON values, dataclasses, paths, NumPy values.

    Raises:
      OtherConfigurationError: if the folder holds another configuration's results (the differing
        settings are named).
      ValueError: if it holds files that are no run's.
    """
    path = as_folder(path)
    config = files.plain(config)
    claim = path / "config.json"
    if not claim.exists():
        # Another host may be claiming it: what is being written has a name that begins with a dot.
        is_new = not path.exists() or (path.is_dir() and all(map(_is_hidden, path.iterdir())))
        if not is_new and not claim.exists():
            raise UserError(
                f"Expected a new or empty folder, or a run to resume; {path} is neither. Name "
                "another --out."
            )
        if is_new:
            write_json(claim, config)
    _refuse_difference(path, read_json(claim), config)
    return Run(path)


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of named arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _refuse_difference(path: Path, old: Any, new: Any) -> None:
    """Raises ValueError if two configurations differ, naming the settings that do."""
    old, new = (dict(_flatten(config)) for config in (old, new))
    differing = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if differing:
        shown = ", ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in differing[:5])
        raise OtherConfigurationError(
            f"{path} holds the results of another configuration ({shown}"
            f"{', ...' if len(differing) > 5 else ''}). Name another --out, or repeat the settings."
        )


def _is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot."""
    return path.name.startswith(".")


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of nested dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
