"""The states of a training run on disk, and requests to stop, which come in between.

Orbax writes into a temporary directory beside the checkpoint and renames it when all is on disk, so
that a killed process leaves the previous checkpoint or the new one, never half of one; in a bucket,
where nothing is renamed, what is not all there lacks a last file and does not count.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp
from etils import epath

from ur_jax.encoders import checkpoints
from ur_jax.errors import DamagedError, Stop, UserError
from ur_jax.runs import is_in_bucket
from ur_jax.types import PyTree

_ITEMS = ("state", "metadata")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
          listens: SIGTERM and a first Ctrl-C no longer end the process at once but turn
            `asked_to_stop` true, for a caller that looks at it after every step; a second Ctrl-C
            does.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
        )
        # Absolute: with a relative path Orbax's background write fails silently.
        place = directory if is_in_bucket(directory) else os.path.abspath(directory)
        self._directory = epath.Path(place)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._saving: int | None = None
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        # On a pod, JAX's coordinator listens itself, and all hosts stop at the same step.
        in_main = threading.current_thread() is threading.main_thread()
        if listens and in_main and jax.process_count() == 1:
            for each in _SIGNALS:
                if signal.getsignal(each) != signal.SIG_IGN:  # as nohup wants it
                    self._before[each] = signal.signal(each, self._listen)

    def asked_to_stop(self, step: int) -> bool:
        """Whether the process is to stop: by SIGTERM, Ctrl-C or a pod's preemption."""
        return self._asked is not None or self._manager.reached_preemption(step)

    def stop(self) -> NoReturn:
        """Ends a process that was asked to stop, once everything is on disk.

        Raises:
          KeyboardInterrupt: after Ctrl-C; or what else the program's handler of a signal raises.
          Stop: where it has none.
        """
        self.wait()
        before = None if self._asked is None else self._before[self._asked]
        if callable(before):
            before(self._asked, None)
        raise Stop

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
        self.wait()  # files are listed of one step at a time
        self._saving = step
        with checkpoints.disk_errors(self._directory):
            self._manager.save(step, args=arguments)

    def restore(self, state_like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads the newest state.

        Args:
          state_like: a state of the same structure and shapes; each restored array lies on the
            devices of its counterpart, however many the saved one lay on.

        Returns:
          (state, metadata).

        Raises:
          DamagedError: if its files are not as they were written; it names the directory.
          UserError: if there is no checkpoint, or it is of another state.
        """
        step = self.latest_step
        if step is None:
            raise UserError(f"There is no checkpoint to resume from in {self._directory}.")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state_like)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), metadata=ocp.args.JsonRestore()
        )
        # Before they are read: a flipped bit would be a weight, and tensorstore's threads go on
        # printing what they stumble over.
        for item in _ITEMS:
            try:
                checkpoints.check_files(self._directory / str(step) / item)
            except UserError as error:
                remedy = "Begin anew, or fetch a copy of that folder."
                raise DamagedError(self._directory, str(error), remedy) from error
        try:
            restored = self._manager.restore(step, args=arguments)
        except Exception as error:  # tensorstore and orbax have no common class for it
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"The checkpoint of step {step} in {self._directory} is damaged or of another "
                f"configuration ({why[:300]}); remove it or resume as it began."
            ) from error
        return restored["state"], restored["metadata"]

    def wait(self) -> None:
        """Waits until everything is on disk."""
        with checkpoints.disk_errors(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk and ends the background threads."""
        try:
            with checkpoints.disk_errors(self._directory):
                self._manager.close()
        finally:
            while self._before:
                signal.signal(*self._before.popitem())

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _listen(self, number: int, frame: Any) -> None:
        """Remembers a request to stop; a second Ctrl-C has its usual effect."""
        self._asked = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def _list_files(self) -> None:
        """Writes the hashes of a step's files beside them, before the step gets its last name."""
        if jax.process_index() != 0:
            return
        for path in self._directory.iterdir():
            if path.name.partition(".")[0] == str(self._saving):
                for item in _ITEMS:
                    checkpoints.write_manifest(path / item)
