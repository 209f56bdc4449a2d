"""Encoders on disk, to hand on: checkpoints by Orbax.

Orbax writes into a temporary directory beside the checkpoint and renames it when all is on disk, so
that a killed process leaves the previous checkpoint or the new one, never half of one; in a bucket,
where nothing is renamed, what is not all there lacks a last file and does not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ur_jax.devices import hosts
from ur_jax.errors import NotFoundError, UserError
from ur_jax.runs import is_in_bucket, read_json, write_json
from ur_jax.types import PyTree

_FORMAT = 1
_MANIFEST = "files.json"
_LAST = "commit_success.txt"  # Orbax's last file in a bucket; copies may lack it
_ORBAX = "_CHECKPOINT_METADATA"  # written first; what has it is a checkpoint, or was to be one
_PACKAGES = ("ur_jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


def save_encoder(
    path: str | os.PathLike,
    variables: PyTree,
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes the variables of a network as a checkpoint directory, all or nothing.

    On several hosts all of them call it.

    Args:
      path: the directory to make.
      variables: {"params"[, "batch_stats"]} with BatchNorm unfolded, as `restore_encoder` gives.
      metadata: JSON data with at least "encoder" (a name that `load_encoder` knows) and "config"
        (keyword arguments of its network). Format, hash of the weights and versions are added.
      overwrite: replace a checkpoint that is at `path`, whole or not; anything else is left alone.

    Raises:
      UserError: if something is at `path` that may not be replaced, or the metadata lack a field.
    """
    path = _absolute(path)
    if missing := {"encoder", "config"} - set(metadata):
        raise UserError(f"Expected metadata with {sorted(missing)}, got {sorted(metadata)}.")
    check_new(path, overwrite=overwrite)
    variables = jax.tree.map(np.asarray, variables)
    added = {"format": _FORMAT, "weights_sha256": tree_hash(variables), "versions": _versions()}
    record = json.loads(json.dumps({**metadata, **added}))
    # What is to be replaced stays until the new one is all there; in a bucket nothing is renamed.
    beside = path.exists() and not is_in_bucket(path)
    place = path.with_name(f".{path.name}.new") if beside else path
    if hosts.is_first() and place.exists():
        place.rmtree()  # half a checkpoint
    hosts.on_all_hosts(True)
    with disk_errors(path), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(place, variables, custom_metadata=record)
    hosts.on_all_hosts(True)
    if hosts.is_first():
        write_manifest(place)
        if beside:
            path.rmtree()
            place.rename(path)
    hosts.on_all_hosts(True)


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Has a disk's error be an OSError with its number, as everywhere: Orbax tells it in words."""
    try:
        yield
    except Exception as error:  # tensorstore and orbax have no common class for it
        if (found := re.search(r"os_error_code='(\d+)'", str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def check_new(path: str | os.PathLike, *, overwrite: bool) -> None:
    """Raises UserError if a checkpoint may not be written to a path; on all hosts."""
    path = _absolute(path)
    # All have looked before one of them writes.
    if hosts.on_all_hosts(is_saved(path)).any():
        if not overwrite:
            raise UserError(
                f"Expected a new directory, but {path} exists; name another, remove it or "
                "overwrite it (overwrite=True, --overwrite)."
            )
        if not (path / _ORBAX).exists():
            raise UserError(f"Expected a checkpoint to overwrite, but {path} is something else.")


def write_manifest(path: str | os.PathLike) -> None:
    """Writes the hashes of a checkpoint's files into it, for `check_files`."""
    path = _absolute(path)
    write_json(cast(Path, path / _MANIFEST), {"format": 1, "files": _hashes(path)})


def restore_encoder(
    path: str | os.PathLike,
    *,
    before: Callable[[Mapping[str, Any], Mapping[str, Any]], None] | None = None,
) -> tuple[PyTree, dict[str, Any]]:
    """Reads a checkpoint that `save_encoder` wrote, whatever devices either machine has.

    Args:
      path: the checkpoint directory.
      before: called with the metadata and the tree of shapes before memory is taken for the
        variables; raises if they are not to be read.

    Returns:
      (variables as NumPy arrays, metadata).

    Raises:
      FileNotFoundError: if there is no such directory.
      ValueError: if it is not an encoder checkpoint, is damaged, or is of a later format.
    """
    path = _absolute(path)
    check_files(path)
    with ocp.StandardCheckpointer() as checkpointer, _readable(path) as place:
        stored, metadata = _read_metadata(path, checkpointer, place)
        if before is not None:
            before(metadata, stored.item_metadata.tree)
        try:
            target = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), stored.item_metadata.tree)
            variables = checkpointer.restore(place, target)
        except Exception as error:  # tensorstore and orbax have no common class for it
            raise _damaged(path, f"{type(error).__name__}: {error}"[:200]) from error
    # Without this, a flipped bit would be read as a weight.
    if tree_hash(variables) != metadata["weights_sha256"]:
        raise _damaged(path, "its weights do not have the recorded SHA-256")
    return variables, metadata


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the metadata of a checkpoint alone.

    Args:
      path: the checkpoint directory.

    Raises:
      As `restore_encoder`.
    """
    path = _absolute(path)
    with ocp.StandardCheckpointer() as checkpointer, _readable(path) as place:
        return _read_metadata(path, checkpointer, place)[1]


@contextlib.contextmanager
def _readable(path: epath.Path) -> Iterator[epath.Path]:
    """Where Orbax reads it: a copy on this host of one in a bucket that lacks the last file."""
    if not (is_in_bucket(path) and path.exists()) or ocp.utils.is_checkpoint_finalized(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = epath.Path(folder) / path.name
        for name in _names(path):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((path / name).read_bytes())
        yield copy


def _read_metadata(
    path: epath.Path, checkpointer: ocp.StandardCheckpointer, place: epath.Path
) -> tuple[Any, dict[str, Any]]:
    """What Orbax says of a checkpoint, and our own metadata in it."""
    if not path.exists():
        raise NotFoundError(f"There is no checkpoint {path}; check the path.")
    try:
        stored = checkpointer.metadata(place)
        metadata = stored.custom_metadata or {}
    except Exception:  # whatever else may lie at the path
        stored, metadata = None, {}
    if "weights_sha256" not in metadata:
        raise UserError(
            f"Expected an encoder checkpoint directory, but {path} has no readable metadata of "
            "one; make it with `ur-jax convert-weights` or `ur_jax.save_encoder`."
        )
    if metadata["format"] > _FORMAT:
        raise UserError(
            f"Expected a checkpoint of format {_FORMAT} or before, got {metadata['format']} in "
            f"{path}; upgrade ur_jax."
        )
    return stored, metadata


def is_saved(path: str | os.PathLike) -> bool:
    """Whether there is something at a path, other than half a checkpoint in a bucket.

    In a bucket nothing is renamed when it is all there. A checkpoint is whole if its files are
    those that its manifest lists, or without a manifest if its weights have the recorded hash:
    Orbax's last file, which says the same, is lost where a checkpoint is copied there.
    """
    path = _absolute(path)
    if not (is_in_bucket(path) and (path / _ORBAX).exists()):
        return path.exists()
    if (path / _MANIFEST).exists():
        return not _differing(path)
    if ocp.utils.is_checkpoint_finalized(path):
        return True
    try:
        restore_encoder(path)
    except UserError:
        return False
    return True


def check_files(path: str | os.PathLike) -> None:
    """Raises UserError unless the files of a checkpoint are those that were written.

    By the hashes in its manifest, before anything is read from them; a checkpoint of a version that
    wrote none passes.
    """
    path = _absolute(path)
    if (path / _MANIFEST).exists() and (differing := _differing(path)):
        raise _damaged(path, f"{differing[0]} is not as it was written")


def _differing(path: epath.Path) -> list[str]:
    """Files of a checkpoint that are missing or differ from what its manifest says."""
    try:
        listed = read_json(cast(Path, path / _MANIFEST))["files"]
        have = _hashes(path, listed)
        return [name for name, digest in listed.items() if have.get(name) != digest]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [_MANIFEST]


def _names(path: epath.Path) -> Iterator[str]:
    """The files below a directory, by their names from there."""
    for entry in path.iterdir():
        if entry.is_dir():
            yield from (f"{entry.name}/{name}" for name in _names(entry))
        elif entry.name not in (_MANIFEST, _LAST):
            yield entry.name


def _hashes(path: epath.Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """{name below the directory: SHA-256} of those of some files that are there, or of all."""
    if names is None:
        names = sorted(_names(path))
    present = (name for name in names if (path / name).exists())
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in present}


def tree_hash(tree: PyTree) -> str:
    """Returns the SHA-256 of a pytree: names, shapes and float32 bytes of its leaves in order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name}{np.shape(leaf)}".encode())
        content: Any = np.ascontiguousarray(np.asarray(leaf).astype("<f4", copy=False))
        digest.update(content)
    return digest.hexdigest()


def _absolute(path: str | os.PathLike) -> epath.Path:
    """The path as Orbax needs it: with a relative one its background write fails silently."""
    return epath.Path(path if is_in_bucket(path) else os.path.abspath(path))


def _damaged(path: epath.Path, why: str) -> UserError:
    """The error for a checkpoint that is not whole."""
    return UserError(f"The checkpoint {path} is damaged: {why}. Convert, train or fetch it again.")


def _versions() -> dict[str, str]:
    """Versions of what wrote the checkpoint."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
