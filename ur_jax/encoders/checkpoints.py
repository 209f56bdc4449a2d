"""Encoders on disk, to hand on: checkpoints by Orbax.

Orbax writes into a temporary directory beside the checkpoint and renames it when all is on disk, so
that a killed process leaves the previous checkpoint or the new one, never half of one; in a bucket,
where nothing is renamed, what is not all there lacks a last file and does not count.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ur_jax.devices import hosts
from ur_jax.errors import NotFoundError, UserError
from ur_jax.runs import is_in_bucket
from ur_jax.types import PyTree

_FORMAT = 1
_PACKAGES = ("ur_jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


def save_encoder(path: str | os.PathLike, variables: PyTree, metadata: Mapping[str, Any]) -> None:
    """Writes the variables of a network as a checkpoint directory, all or nothing.

    On several hosts all of them call it.

    Args:
      path: the directory to make; it must not exist.
      variables: {"params"[, "batch_stats"]} with BatchNorm unfolded, as `restore_encoder` gives.
      metadata: JSON data with at least "encoder" (a name that `load_encoder` knows) and "config"
        (keyword arguments of its network). Format, hash of the weights and versions are added.

    Raises:
      ValueError: if something is at `path` already, or the metadata lack a field.
    """
    path = _absolute(path)
    if hosts.on_all_hosts(is_saved(path)).any():  # all have looked before one of them writes
        raise UserError(f"Expected a new directory, but {path} exists; remove it or name another.")
    if missing := {"encoder", "config"} - set(metadata):
        raise UserError(f"Expected metadata with {sorted(missing)}, got {sorted(metadata)}.")
    variables = jax.tree.map(np.asarray, variables)
    added = {"format": _FORMAT, "weights_sha256": tree_hash(variables), "versions": _versions()}
    record = json.loads(json.dumps({**metadata, **added}))
    if hosts.is_first() and path.exists():
        path.rmtree()  # half a checkpoint
    hosts.on_all_hosts(True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, variables, custom_metadata=record)


def restore_encoder(path: str | os.PathLike) -> tuple[PyTree, dict[str, Any]]:
    """Reads a checkpoint that `save_encoder` wrote, whatever devices either machine has.

    Args:
      path: the checkpoint directory.

    Returns:
      (variables as NumPy arrays, metadata).

    Raises:
      FileNotFoundError: if there is no such directory.
      ValueError: if it is not an encoder checkpoint, is damaged, or is of a later format.
    """
    path = _absolute(path)
    with ocp.StandardCheckpointer() as checkpointer:
        stored, metadata = _read_metadata(path, checkpointer)
        try:
            target = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), stored.item_metadata.tree)
            variables = checkpointer.restore(path, target)
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
    with ocp.StandardCheckpointer() as checkpointer:
        return _read_metadata(_absolute(path), checkpointer)[1]


def _read_metadata(
    path: epath.Path, checkpointer: ocp.StandardCheckpointer
) -> tuple[Any, dict[str, Any]]:
    """What Orbax says of a checkpoint, and our own metadata in it."""
    if not path.exists():
        raise NotFoundError(f"There is no checkpoint {path}; check the path.")
    try:
        stored = checkpointer.metadata(path)
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
    """Whether there is something at a path, other than half a checkpoint in a bucket."""
    path = _absolute(path)
    is_begun = is_in_bucket(path) and (path / "_CHECKPOINT_METADATA").exists()
    return path.exists() and (not is_begun or ocp.utils.is_checkpoint_finalized(path))


def tree_hash(tree: PyTree) -> str:
    """Returns the SHA-256 of a pytree: names, shapes and float32 bytes of its leaves in order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name}{np.shape(leaf)}".encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf).astype("<f4", copy=False)))
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
