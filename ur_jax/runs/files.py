"""Files written atomically: JSON, Parquet, and whatever else, on a file system or in a bucket.

A bucket (`gs://...`) is given as a string or an `etils.epath.Path`: `pathlib.Path` loses one of the
slashes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from etils import epath

from ur_jax.errors import DamagedError, UserError

_CHECKSUM = "sha256"


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
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk: only writing to it failed
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; dataclasses, paths and NumPy become plain, NaN and inf null.

    An object gets its own SHA-256, by which `read_json` knows that it is whole.
    """
    value = _finite(plain(value))
    if isinstance(value, dict):
        value[_CHECKSUM] = _json_hash(value)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def to_json(value: Any) -> str:
    """JSON text; dataclasses, paths and NumPy become plain, NaN and inf null."""
    return json.dumps(_finite(plain(value)), indent=1, allow_nan=False)


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote, or other JSON.

    Raises:
      DamagedError: for a file that is not as it was written; it names the file.
    """
    remedy = "`ur-jax repair` sets it aside; then repeat the command that made it."
    try:
        value = json.loads(path.read_text())
    except ValueError as error:  # also of bytes that are no text
        raise DamagedError(path, str(error), remedy) from error
    if isinstance(value, dict) and _CHECKSUM in value:
        if value.pop(_CHECKSUM) != _json_hash(value):
            raise DamagedError(path, "it does not have its recorded SHA-256", remedy)
    return value


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def move(path: Path, to: Path) -> None:
    """Moves a file or a folder with all that is in it, if it is there; `to` must not exist.

    In a bucket, where nothing can be renamed, one object after the other.
    """
    if not path.exists():
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    if not is_in_bucket(path):
        os.rename(path, to)
        return
    if not path.is_dir():
        to.write_bytes(path.read_bytes())
        path.unlink()
        return
    for each in list(path.iterdir()):
        move(each, to / each.name)
    cast(epath.Path, path).rmtree(missing_ok=True)  # empty, where a bucket knows folders at all


def write_table(path: Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Writes columns of equal length as Parquet, atomically."""
    import pyarrow as pa  # here and below: JSON is written where Parquet is not installed
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    # A file and not its path: pyarrow wants paths to be UTF-8.
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pq.write_table(table, file)


def read_table(path: Path, columns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads columns that `write_table` wrote: some of them, all by default.

    Raises:
      DamagedError: for a file that is no Parquet; it names the file. Of a finished run, the
        summary's hashes tell more, see `summary.Summary.files`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        try:
            table = pq.read_table(file, columns=columns and list(columns))
        except (pa.ArrowException, OSError, ValueError) as error:
            remedy = "Remove summary.json beside it and repeat the command that made it."
            raise DamagedError(path, str(error)[:200], remedy) from error
    return {name: table[name].to_numpy() for name in table.column_names}


def as_folder(path: str | os.PathLike) -> Path:
    """A folder of a file system or a bucket.

    Raises:
      ValueError: for a bucket that lost a slash in a `pathlib.Path`.
    """
    text = os.fspath(path)
    if re.match(r"\w+:/(?!/)", text):
        raise UserError(
            f"Expected a bucket as gs://BUCKET/FOLDER, got {text!r}: pathlib drops a slash. Give a "
            "string or an etils.epath.Path."
        )
    return cast(Path, epath.Path(text))  # which has all of its methods


def is_in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is of a bucket."""
    return "://" in os.fspath(path)


def plain(value: Any) -> Any:
    """The JSON value of dataclasses, paths and NumPy values, as it is written."""
    return json.loads(json.dumps(value, default=_plain))


def fingerprint(config: Any) -> str:
    """Short hash of a configuration, equal for equal settings."""
    text = json.dumps(config, default=_plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _json_hash(value: Any) -> str:
    """SHA-256 of a JSON value, but for an object's own."""
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A JSON value for what `json` does not know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
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
