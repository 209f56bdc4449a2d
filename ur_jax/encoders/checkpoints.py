"""Checkpoints on disk: encoders to hand on, and the states of a training run. Alone knows Orbax.

Orbax writes into a temporary directory beside the checkpoint and renames it when all is on disk, so
that a killed process leaves the previous checkpoint or the new one, never half of one; in a bucket,
where nothing is renamed, what is not all there lacks a last file and does not count.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import threading
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


class TrainingCheckpoints:
    """The latest states of a training run, written in the background; a context manager.

    Leaving the context, `close` or `wait` finishes the writing: without one the last state is lost.
    """

    def __init__(
        self, directory: str | os.PathLike, *, max_to_keep: int = 1, listens: bool = False
    ):
        """Opens the directory, making it if need be; what a killed run left half is removed.

        Args:
          directory: of the run's states.
          max_to_keep: how many of the newest.
          listens: SIGTERM no longer ends the process at once but turns `asked_to_stop` true, for a
            caller that looks at it after every step.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, cleanup_tmp_directories=True
        )
        self._directory = _absolute(directory)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._asked, self._before = threading.Event(), None
        # On a pod, JAX's coordinator listens itself, and all hosts stop at the same step.
        in_main = threading.current_thread() is threading.main_thread()
        if listens and in_main and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())

    def asked_to_stop(self, step: int) -> bool:
        """Whether the machine wants its processes to stop: by SIGTERM, or a pod's preemption."""
        return self._asked.is_set() or self._manager.reached_preemption(step)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, if there is one."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Starts to write a state, any pytree of arrays (typed keys too), and JSON metadata.

        Does nothing if `step` is not after `latest_step`.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(dict(metadata))
        )
        self._manager.save(step, args=arguments)

    def restore(self, state_like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads the newest state.

        Args:
          state_like: a state of the same structure and shapes; each restored array lies on the
            devices of its counterpart, however many the saved one lay on.

        Returns:
          (state, metadata).

        Raises:
          ValueError: if there is no checkpoint, or it is damaged or of another state.
        """
        step = self.latest_step
        if step is None:
            raise UserError(f"There is no checkpoint to resume from in {self._directory}.")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state_like)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), metadata=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=arguments)
        except Exception as error:  # tensorstore and orbax have no common class for it
            raise UserError(
                f"The checkpoint of step {step} in {self._directory} is damaged or of another "
                f"configuration ({type(error).__name__}: {error}); remove it or resume as it began."
            ) from error
        return restored.state, restored.metadata

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk and ends the background threads."""
        self._manager.close()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


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
