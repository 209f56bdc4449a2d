"""The clock: implementations of the same work by turns, and the device's own peaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.errors import UserError


class Workload(NamedTuple):
    """One implementation of some work, ready to run.

    Attributes:
      implementation: its name in tables.
      run: does the work once and waits for it.
      items: what one run does, in the work's unit.
      compile_seconds: what compiling took, or the first run where that compiles.
      flops: floating-point operations of one run, by the compiler's count; None if unknown.
      bytes_moved: bytes of one run to and from memory, likewise.
      memory: bytes that the program holds at its peak; None if unknown.
      note: what a reader of the number must know.
    """

    implementation: str
    run: Callable[[], Any]
    items: float
    compile_seconds: float
    flops: float | None = None
    bytes_moved: float | None = None
    memory: int | None = None
    note: str = ""


class Times(NamedTuple):
    """Seconds of the runs of one workload: the first, then [R] wall and [R] processor seconds."""

    warmup: float
    wall: np.ndarray
    processor: np.ndarray


class Peaks(NamedTuple):
    """What the device reaches: {dtype: flops per second} of a product, bytes per second of a copy.

    Products take the precision that JAX gives them by default (TF32 for float32 on recent GPUs).
    """

    flops: dict[str, float]
    bandwidth: float


def time_by_turns(workloads: Sequence[Workload], repeats: int) -> list[Times]:
    """Times workloads A, B, ... in the order A B ... A B ..., so that a disturbance hits all alike.

    Args:
      workloads: what to time; each is run once before, which is its `warmup`.
      repeats: runs of each, >= 1.
    """
    if repeats < 1:
        raise UserError(f"Expected repeats >= 1, got {repeats}.")
    warmups = [_timed(workload.run)[0] for workload in workloads]
    rounds = [[_timed(workload.run) for workload in workloads] for _ in range(repeats)]
    seconds = np.asarray(rounds).transpose(1, 2, 0)
    return [Times(warmup, *both) for warmup, both in zip(warmups, seconds, strict=True)]


def device_peaks(dtypes: Sequence[str], repeats: int = 5) -> Peaks:
    """Measures the best of a few large matrix products and copies on the default device."""
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    multiply, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)

    def best(fn, argument):
        run = lambda: jax.block_until_ready(fn(argument))
        run()
        return min(_timed(run)[0] for _ in range(repeats))

    # Not of ones: a GPU multiplies equal numbers faster than others, since it needs less power.
    numbers = jax.random.normal(jax.random.key(0), (size, size))
    products = {dtype: best(multiply, numbers.astype(dtype)) for dtype in dtypes}
    large = jnp.ones(2**26 if on_cpu else 2**29, jnp.float32)
    return Peaks(
        flops={dtype: 2 * size**3 / seconds for dtype, seconds in products.items()},
        bandwidth=2 * large.nbytes / best(copy, large),
    )


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor
