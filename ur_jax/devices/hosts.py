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


def join() -> None:
    """Joins the other hosts, if a TPU pod, SLURM (`srun`) or Open MPI started this process.

    To be called before anything else of JAX; does nothing on a lone machine, or where
    `jax.distributed.initialize` was called already.
    """
    if not jax.distributed.is_initialized() and _is_launched():
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this is the host that merges and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def before_merge(num_hosts: int | None = None) -> Iterator[None]:
    """Runs a block on every host, each with its share, and goes on once all are through.

    Args:
      num_hosts: all hosts by default; 1 for a block that this one runs alone.

    Raises:
      RuntimeError: on the hosts that were successful, if another one failed; a host that failed
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
        raise RuntimeError(f"Host {', '.join(map(str, failed))} failed; see its output.")


def on_all_hosts(value: bool | int) -> np.ndarray:
    """Returns every host's value, (num_hosts,), once all have called this."""
    if jax.process_count() == 1:
        return np.array([value])
    return np.asarray(multihost_utils.process_allgather(np.array([value]), tiled=True))


def _is_launched() -> bool:
    """Whether the environment names other processes of this run, or this is a TPU VM."""
    tasks = (os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if any(int(count) > 1 for count in tasks):
        return True
    has_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    allowed = "tpu" in (jax.config.jax_platforms or "tpu")  # pyright: ignore
    return has_tpu and allowed and importlib.util.find_spec("libtpu") is not None
