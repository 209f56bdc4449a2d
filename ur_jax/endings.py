"""How a command ends: what a user can mend, or asked for, in one line with an exit status.

| status | meaning |
| --- | --- |
| 0 | done |
| 1 | some stages failed, or another host did; a fault of ours, which keeps its traceback |
| 2 | bad input, or a place that cannot be written: nothing was begun, or what was is kept |
| 130 | interrupted by Ctrl-C |
| 143 | asked to stop by SIGTERM |

Parts are written as they finish and whole or not at all, so a command may be stopped at any time
and repeated.
"""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import errno
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from ur_jax.devices import hosts
from ur_jax.errors import Stop, UserError, remedy_of
from ur_jax.jobs import JOBS, progress

DONE, IN_PART, BAD, INTERRUPTED, STOPPED = 0, 1, 2, 130, 143
STATUSES = (
    "exit status: 0 done; 1 in part (some stages failed, or another host did), or a fault;\n"
    "2 bad input or a place that cannot be written; 130 interrupted (Ctrl-C); 143 asked to stop\n"
    "(SIGTERM). What is finished is kept: the same command goes on."
)
"""For the usage."""

_SECONDS = 10.0
"""How long a computation may go on after a signal, and other hosts after this one's failure."""
_RESUMED = ("benchmark", "reproduce-cifar", *JOBS)


class End(NamedTuple):
    """How a command ended.

    Attributes:
      status: of the process.
      line: what to say.
    """

    status: int
    line: str


class Ending:
    """A `with` around a command: what ends it is told in one line, and `status` says how it ended.

    Signals are obeyed even while JAX computes, when Python does not see them: a thread waits for a
    few seconds, then ends the process.

    Attributes:
      name: of the command, once it is known.
      flags: the command's, once they are known; the line names their folder and batch sizes.
      status: of the process.
    """

    def __init__(self):
        self.name, self.flags, self.status = "", None, DONE
        self._told, self._is_asked, self._repeated = False, False, 0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> Ending:
        if threading.current_thread() is threading.main_thread():
            self._pipe = socket.socketpair()
            for end in self._pipe:
                end.setblocking(False)
            self._old_fd = signal.set_wakeup_fd(self._pipe[1].fileno(), warn_on_full_buffer=False)
            self.obey_signals()
            self._hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
            self._pipe[0].setblocking(True)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def obey_signals(self) -> None:
        """Has signals raise; again after `hosts.join`, since JAX takes SIGTERM for itself."""
        if self._pipe is None:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:  # as nohup wants it
                self._before.setdefault(number, before)
                signal.signal(number, self._raise)

    def _raise(self, number: int, frame: Any) -> None:
        """Handles a signal."""
        self._is_asked = True
        raise Stop if number == signal.SIGTERM else KeyboardInterrupt

    def _raise_again(self, lost) -> None:
        """Raises an interruption again that came where nothing can be raised: JAX's callbacks."""
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            if str(lost.exc_value) != "Event loop is closed":  # of writers whose disk has failed
                self._hook(lost)
            return
        number = signal.SIGTERM if issubclass(lost.exc_type, Stop) else signal.SIGINT
        self._repeated += 1
        again = threading.Timer(0.05, _thread.interrupt_main, (number,))
        again.daemon = True
        again.start()

    def __exit__(self, kind, error: BaseException | None, trace) -> bool:
        if isinstance(error, SystemExit):  # of tyro: it has told what is wrong
            self._restore()
            return False
        end = None if error is None else end_of(error, self.name, self.flags)
        if end is not None:
            self.status = end.status
            self._tell(end.line)
        elif error is not None:
            self.status = IN_PART
            progress.stop()
        self._restore()
        if error is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
            if end is None:
                traceback.print_exception(error)
            _part(self.status)
        if self._is_asked and not _is_interactive():
            _end_now(self.status)  # Python's own end would wait for what JAX computes
        return end is not None

    def _tell(self, line: str) -> None:
        """Says how it ended, below whatever bar is shown, once."""
        if self._told:
            return
        self._told = True
        progress.stop()
        if not line:  # nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return
        progress.console.quiet = False
        progress.console.print(
            _of_host(line), style="bold red", markup=False, highlight=False, soft_wrap=True
        )

    def _restore(self) -> None:
        """Gives the signals back, and ends the thread."""
        if self._pipe is None:
            return
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._old_fd)
        sys.unraisablehook = self._hook
        self._pipe[1].close()

    def _watch(self, reading: socket.socket) -> None:
        """Ends the process some seconds after a signal, if it has not ended, or at the second."""
        with reading:
            while (number := _signal_of(reading)) is not None:
                is_ours = signal.getsignal(signal.SIGTERM) == self._raise
                if number not in (signal.SIGINT, signal.SIGTERM) or not is_ours:
                    continue  # training saves its state first
                give_up = time.monotonic() + _SECONDS
                with contextlib.suppress(TimeoutError):
                    while True:
                        reading.settimeout(max(give_up - time.monotonic(), 0.01))
                        if _signal_of(reading) is None:
                            return  # the command ended
                        if not self._repeated:
                            break  # somebody asks a second time
                        self._repeated -= 1
                error = Stop() if number == signal.SIGTERM else KeyboardInterrupt()
                end = end_of(error, self.name, self.flags)
                assert end is not None
                if not self._told:
                    self._told = True
                    os.write(2, f"\n{_of_host(end.line)}\n".encode())
                _end_now(end.status)


def end_of(error: BaseException, name: str = "", flags: Any = None) -> End | None:
    """How an error ends a command; None for a fault, which keeps its traceback.

    Args:
      error: what was raised.
      name: of the command.
      flags: its flags, if they are known.
    """
    place = getattr(flags, "out", None) or getattr(flags, "workdir", None)
    kept = ""
    if name in _RESUMED and place is not None:
        kept = f" What is finished is kept in {place}; repeat the command to go on."
    if isinstance(error, UserError):
        return End(BAD, f"error: {error}")
    if isinstance(error, KeyboardInterrupt):
        is_stop = isinstance(error, Stop)
        line = "asked to stop." if is_stop else "interrupted."
        return End(
            STOPPED if is_stop else INTERRUPTED, line + (kept or " Nothing is half written.")
        )
    if isinstance(error, hosts.OtherHostError):
        return End(IN_PART, f"error: {error}{kept}")
    if isinstance(error, BrokenPipeError):
        return End(DONE, "")
    if isinstance(error, OSError) and (remedy := remedy_of(error)) is not None:
        where = error.filename or place or "a file"
        reason = os.strerror(error.errno or 0).lower()
        return End(BAD, f"error: {where}: {reason}; {remedy}.{kept}")
    if isinstance(error, FileNotFoundError) and place and error.filename == os.fspath(place):
        return End(BAD, f"error: {place}: it cannot be made; name another place.")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return End(BAD, f"error: {error}; {remedy_of(OSError(errno.EAGAIN, ''))}.{kept}")
    if is_out_of_memory(error):
        sizes = " or ".join(f"{flag} (now {size})" for flag, size in _batch_sizes(flags))
        first = next(iter(str(error).splitlines()), "") or "no more could be had"
        remedy = f"give a smaller {sizes or 'batch'}, or bfloat16"
        return End(BAD, f"error: out of memory ({first[:160]}); {remedy}.{kept}")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine had no memory left for an array."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, jax.errors.JaxRuntimeError) and (
        "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
    )


def _batch_sizes(flags: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """The flags that set a batch size, with what they are."""
    if not dataclasses.is_dataclass(flags):
        return
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        flag = f"{prefix}{field.name.replace('_', '-')}"
        if field.name.endswith("batch_size"):
            yield flag, value
        elif dataclasses.is_dataclass(value):
            is_flat = field.name == "job" or "OmitArgPrefixes" in str(field.type)
            yield from _batch_sizes(value, prefix if is_flat else f"{flag}.")


def _signal_of(reading: socket.socket) -> int | None:
    """The next signal; None once nobody writes any more."""
    got = reading.recv(1)
    return got[0] if got else None


def _of_host(line: str) -> str:
    """A line with the host that says it, if there are several."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return line
    return f"host {jax.process_index()}: {line}"


def _is_interactive() -> bool:
    """Whether the process goes on after the command: a notebook, a prompt."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or progress.console.is_jupyter


def _part(status: int) -> None:
    """Ends this process of several without waiting for the others at the door for long."""
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(_SECONDS)
    _end_now(status)


def _end_now(status: int) -> None:
    """Ends the process and its workers, whatever else still computes."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
