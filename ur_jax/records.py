"""Results on disk: written atomically, claimed by one configuration, resumed part by part.

A run's folder holds `config.json` (what it computes; another configuration is refused), `parts/`
(what is finished so far) and, at the end, its tables and `summary.json`. Folders may be of a bucket
(`gs://...`), given as a string or an `etils.epath.Path`: `pathlib.Path` loses one of the slashes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

SCHEMA = 2
"""Version of the layout of `summary.json` (see `results`) and of the tables."""

_PACKAGES = ("ur_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "pillow")


class OtherConfigurationError(ValueError):
    """A folder holds the results of another configuration."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path, whose contents `path` gets if the block ends without error.

    It lies beside `path`; or, of a bucket, whose objects appear whole or not at all, on this host.
    """
    if is_in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            path.write_bytes(temporary.read_bytes())
        return
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; dataclasses, paths and NumPy become plain, NaN and inf null."""
    value = _finite(json.loads(json.dumps(value, default=_plain)))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote."""
    return json.loads(path.read_text())


def write_table(path: Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Writes columns of equal length as Parquet, atomically."""
    import pyarrow as pa  # here and below: JSON is written where Parquet is not installed
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(
            pa.table({name: pa.array(values) for name, values in columns.items()}), temporary
        )


def read_table(path: Path, columns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads columns that `write_table` wrote: some of them, all by default."""
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        table = pq.read_table(file, columns=columns and list(columns))
    return {name: table[name].to_numpy() for name in table.column_names}


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
        """Writes one finished part, atomically."""
        with atomic_path(self.part(stage, number)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})

    def read_parts(self, stage: str) -> dict[str, np.ndarray]:
        """All finished parts of a stage, joined along the leading axis."""
        parts = []
        for number in range(self.num_parts(stage)):
            with self.part(stage, number).open("rb") as file, np.load(file) as part:
                parts.append(dict(part))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
    config = json.loads(json.dumps(config, default=_plain))
    claim = path / "config.json"
    if not claim.exists():
        # Another host may be claiming it: what is being written has a name that begins with a dot.
        is_new = not path.exists() or (path.is_dir() and all(map(_is_hidden, path.iterdir())))
        if not is_new and not claim.exists():
            raise ValueError(
                f"Expected a new or empty folder, or a run to resume; {path} is neither."
            )
        if is_new:
            write_json(claim, config)
    _refuse_difference(path, json.loads(claim.read_text()), config)
    return Run(path)


def as_folder(path: str | os.PathLike) -> epath.Path:
    """A folder of a file system or a bucket.

    Raises:
      ValueError: for a bucket that lost a slash in a `pathlib.Path`.
    """
    text = os.fspath(path)
    if re.match(r"\w+:/(?!/)", text):
        raise ValueError(
            f"Expected a bucket as gs://BUCKET/FOLDER, got {text!r}: pathlib drops a slash. Give a "
            "string or an etils.epath.Path."
        )
    return epath.Path(text)


def fingerprint(config: Any) -> str:
    """Short hash of a configuration, equal for equal settings."""
    text = json.dumps(config, default=_plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """What produced a result: schema, commit, versions, devices and precision of products."""
    devices = jax.devices()
    return {
        "schema": SCHEMA,
        "commit": _commit(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
    }


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


def is_in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is of a bucket."""
    return "://" in os.fspath(path)


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


def _plain(value: Any) -> Any:
    """A JSON value for what `json` does not know."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value).tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"Expected a JSON value, got {type(value).__name__}.")


def _finite(value: Any) -> Any:
    """A JSON value with null for each number that JSON cannot write."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str:
    """Installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _commit() -> str:
    """Commit of the checkout that this package runs from; "unknown" outside one."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
