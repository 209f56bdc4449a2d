"""One command at a time in a folder: a lease that its owner renews, taken over when it is stale.

The lease is a file that says who holds it. Clocks are not compared: a lease is stale if its owner
is a process of this machine that is gone, or if nobody renews it while it is watched. It works on
shared file systems and in buckets, where who wrote last has it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ur_jax.devices import hosts
from ur_jax.errors import DamagedError, UserError
from ur_jax.runs import files

NAME = ".lease.json"
RENEWED_EVERY = 10.0
"""Seconds between two renewals."""

_STALE_AFTER = 3.5 * RENEWED_EVERY
_held: set[str] = set()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the lease of a folder while a block runs; of several hosts, the first one does.

    Within a folder that this process holds, such as a stage's in a benchmark's, nothing is done.

    Raises:
      UserError: on all hosts, if another command is at work there.
    """
    place = os.fspath(folder)
    if any(place == other or place.startswith(f"{other}/") for other in _held):
        yield
        return
    with hosts.before_merge():
        lease = _take(folder) if hosts.is_first() else None
    _held.add(place)
    stopped = threading.Event()
    renewing = threading.Thread(target=_renew, args=(folder, lease, stopped), daemon=True)
    if lease is not None:
        renewing.start()
    try:
        yield
    finally:
        _held.discard(place)
        if lease is not None:
            stopped.set()
            renewing.join()
            _release(folder, lease)


def _take(folder: Path) -> dict[str, Any]:
    """Takes the lease, waiting for a stale one to show that it is."""
    lease = {
        "owner": uuid.uuid4().hex,
        "user": _user(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "renewals": 0,
    }
    before = _read(folder)
    if before and not _is_gone(before) and _is_renewed(folder, before):
        raise UserError(
            f"{folder} is in use by {before.get('user')} on {before.get('host')} (process "
            f"{before.get('pid')}, since {before.get('since')}); wait for it, stop it, or name "
            "another folder."
        )
    files.write_json(folder / NAME, lease)
    if files.is_in_bucket(folder):
        time.sleep(1.0)  # two that wrote at once: the later one has it
    now = _read(folder)
    if now.get("owner") != lease["owner"]:
        raise UserError(f"{folder} was taken by {now.get('host')} at this moment; try again.")
    return lease


def _is_renewed(folder: Path, lease: dict[str, Any]) -> bool:
    """Whether somebody renews a lease while it is watched; one that is given back is not."""
    end = time.monotonic() + _STALE_AFTER
    while time.monotonic() < end:
        time.sleep(min(1.0, RENEWED_EVERY / 4))
        now = _read(folder)
        if now != lease:
            return bool(now)
    return False


def _is_gone(lease: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    if lease.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(lease["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return int(lease["pid"]) == os.getpid()  # ours, of a block that was left without its end


def _renew(folder: Path, lease: dict[str, Any], stopped: threading.Event) -> None:
    """Renews a lease until stopped."""
    renewals = 0
    while not stopped.wait(RENEWED_EVERY):
        renewals += 1
        with contextlib.suppress(OSError):  # a full disk stops the work, not this
            files.write_json(folder / NAME, lease | {"renewals": renewals})


def _release(folder: Path, lease: dict[str, Any]) -> None:
    """Gives a lease back, if it is still ours."""
    with contextlib.suppress(OSError):
        if _read(folder).get("owner") == lease["owner"]:
            (folder / NAME).unlink()


def _read(folder: Path) -> dict[str, Any]:
    """The lease of a folder; {} if there is none, or half of one."""
    try:
        value = files.read_json(folder / NAME)
    except (FileNotFoundError, DamagedError):
        return {}
    return value if isinstance(value, dict) else {}


def _user() -> str:
    """Who runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a name for its user
        return str(os.getuid())
