"""Several hosts: joining them, and the merges, the only places where one waits for another.

Every host runs the same command. Images are divided over hosts by their batch number or index, so
what a part holds does not depend on who computes it; the first host merges. The run's folder must
be one that all hosts see.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from ur_jax.devices import launchers
from ur_jax.devices.launchers import Launch
from ur_jax.devices.rollcall import LOOPBACK, address_of, roll_call
from ur_jax.errors import UserError

JOIN_SECONDS = 300
"""How long processes wait for one another at the start."""


class OtherHostError(RuntimeError):
    """Another host of this run failed; what it was is in that host's output."""


def join(launch: Launch | None = None) -> None:
    """Joins the other processes of this run, if a launcher or a TPU pod started several.

    To be called before anything else of JAX; does nothing for a process on its own, or where
    `jax.distributed.initialize` was called already.

    Args:
      launch: who this one is; by default what the environment says, see `launchers`.

    Raises:
      UserError: if the others cannot be found, or if they do not come.
    """
    if jax.distributed.is_initialized():
        return
    launch = launch or launchers.found()
    if launch is not None:
        _join(launch)
    elif _has_tpu():
        try:
            jax.distributed.initialize()
        except ValueError as error:  # it does not know the address or the numbers
            raise UserError(
                f"This machine has a TPU, but JAX does not find whether it is one of several "
                f"({error}). Pass --coordinator HOST:PORT --num-processes N --process-id I; of a "
                "machine on its own localhost:8476, 1 and 0."
            ) from error


def _join(launch: Launch) -> None:
    """Joins the processes of a launch."""
    if launch.num_processes == 1:
        return
    roll_call(launch, JOIN_SECONDS)
    is_local = address_of(launch)[0] in LOOPBACK
    local = None if launch.local_id is None else [launch.local_id]
    jax.distributed.initialize(
        launch.coordinator, launch.num_processes, launch.process_id,
        # JAX obeys the variable where it is told nothing.
        local_device_ids=None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else local,
        cluster_detection_method="deactivate",
        coordinator_bind_address=launch.coordinator if is_local else None,
    )  # fmt: skip


def is_first() -> bool:
    """Whether this is the host that merges and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def before_merge(num_hosts: int | None = None) -> Iterator[None]:
    """Runs a block on every host, each with its share, and goes on once all are through.

    Args:
      num_hosts: all hosts by default; 1 for a block that this one runs alone.

    Raises:
      OtherHostError: on the hosts that were successful, if another one failed; a host that failed
        raises its own error. So all of them leave the block in the same way.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = np.flatnonzero([] if num_hosts == 1 else on_all_hosts(error is not None))
    if error is not None:
        raise error
    if failed.size:
        raise OtherHostError(f"Host {', '.join(map(str, failed))} failed; see its output.")


def on_all_hosts(value: bool | int) -> np.ndarray:
    """Returns every host's value, (num_hosts,), once all have called this."""
    if jax.process_count() == 1:
        return np.array([value])
    return np.asarray(multihost_utils.process_allgather(np.array([value]), tiled=True))


def _has_tpu() -> bool:
    """Whether this is a TPU VM whose TPU this process is to use."""
    has_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    allowed = "tpu" in (jax.config.jax_platforms or "tpu")  # pyright: ignore
    return has_tpu and allowed and importlib.util.find_spec("libtpu") is not None
