"""The measurement: every case of some sweeps within a time budget, and its results."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from ur_jax.devices import check_divisible, data_mesh
from ur_jax.errors import UserError, unknown_name
from ur_jax.performance import work
from ur_jax.performance.sweeps import Sweep
from ur_jax.performance.timing import Peaks, Times, Workload, device_peaks, time_by_turns

AGAINST = ("nothing", "torch")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch")


@dataclasses.dataclass(frozen=True)
class Result:
    """One implementation's measurement.

    Attributes:
      work: what was done.
      encoder, dtype, batch_size: with what.
      implementation: by whom.
      unit: of the rates.
      rate: median over the runs.
      low, high: smallest and largest.
      per_processor_second: items per second of processor time, of all threads.
      compile_seconds: compiling, or the first run of what compiles then.
      warmup_seconds: the run after it, which is not among the measured ones.
      memory_bytes: what the program holds at its peak, as the compiler or PyTorch says.
      flops_share: of the device's peak in this dtype.
      bandwidth_share: of the device's peak.
      bytes_per_item: to and from memory, as the compiler counts them.
      ratio: ours over this implementation's rate, the median of the ratios turn by turn.
      note: what a reader must know.
    """

    work: str
    encoder: str
    dtype: str
    batch_size: int
    implementation: str
    unit: str
    rate: float
    low: float
    high: float
    per_processor_second: float
    compile_seconds: float
    warmup_seconds: float
    memory_bytes: int | None
    flops_share: float | None
    bandwidth_share: float | None
    bytes_per_item: float | None
    ratio: float
    note: str


def run(
    sweeps: Sequence[Sweep],
    *,
    against: str = "nothing",
    budget: float = float("inf"),
    compile_threads: int = 1,
    on_results: Callable[[list[Result], dict[str, Any]], Any] = lambda results, context: None,
) -> tuple[list[Result], dict[str, Any]]:
    """Measures every case, ours and PyTorch's by turns in this process.

    Args:
      sweeps: what to measure, see `sweeps.PRESETS`.
      against: "nothing" or "torch".
      budget: seconds after which no further case begins.
      compile_threads: more than one: what can be is compiled before the first case, so many
        programs at once, which a GPU's many cores do in a fraction of the time. The seconds of
        compiling then are of programs that wait for each other.
      on_results: called with all results and the context after each case.

    Returns:
      The results, and the context: device, peaks, versions, date, cases left out.

    Raises:
      ValueError: for an unknown name, or a batch that does not divide over the devices.
      ImportError: if PyTorch is asked for and not installed.
    """
    if against not in AGAINST:
        raise unknown_name("against", against, AGAINST)
    cases = [(name, size, sweep.repeats) for sweep in sweeps for name, size in sweep.cases()]
    mesh = data_mesh()
    for _, size, _ in cases:
        check_divisible(size.batch_size, mesh)
    check_threads(compile_threads)
    others = lambda name, size: []
    if against == "torch":
        from ur_jax.performance import torch_work

        others = torch_work.workloads
    started = time.monotonic()
    dtypes = sorted({size.dtype for _, size, _ in cases})
    peaks = device_peaks(dtypes)
    context = _context(peaks)
    results: list[Result] = []
    made = _compiled_ahead([(name, size) for name, size, _ in cases], compile_threads)
    for name, size, repeats in cases:
        label = f"{name} {size.encoder} {size.dtype} {size.batch_size}"
        if time.monotonic() - started > budget:
            context["left_out"].append(f"{label}: no time left")
            continue
        try:
            ahead = made.pop((name, size), None)
            ours = work.WORKS[name].make(size) if ahead is None else ahead.result()
            theirs = _fitting(others, name, size, f"{label}, PyTorch", context["left_out"])
            workloads = [ours, *theirs]
            times = time_by_turns(workloads, repeats)
        # Both libraries' "out of memory", or no such work of this encoder: the other cases go on.
        except (RuntimeError, UserError) as error:
            context["left_out"].append(f"{label}: {str(error).splitlines()[0]}")
            continue
        results += _results(name, size, workloads, times, peaks)
        context["seconds"] = time.monotonic() - started
        context["peak_host_memory_bytes"] = _peak_host_memory()
        on_results(results, context)
    return results, context


def check_threads(compile_threads: int) -> None:
    """Raises UserError for no thread, or more than this machine has cores; four are always fine."""
    most = max(4, os.cpu_count() or 1)
    if not 1 <= compile_threads <= most:
        raise UserError(
            f"Expected compile_threads >= 1 and at most {most} on this machine, got "
            f"{compile_threads}."
        )


def _fitting(others, name: str, size: work.Size, label: str, left_out: list[str]):
    """The others' workloads; none if their memory does not suffice, for which ours goes on."""
    try:
        return others(name, size)
    except RuntimeError as error:
        left_out.append(f"{label}: {str(error).splitlines()[0]}")
        return []


def _compiled_ahead(
    cases: Sequence[tuple[str, work.Size]], threads: int
) -> dict[tuple[str, work.Size], Future[Workload]]:
    """Those of `cases` that are one program, compiled in threads; none with one thread."""
    if threads == 1:
        return {}
    with ThreadPoolExecutor(threads) as pool:
        return {
            (name, size): pool.submit(work.WORKS[name].make, size)
            for name, size in dict.fromkeys(cases)
            if work.WORKS[name].is_one_program
        }


def _results(
    name: str,
    size: work.Size,
    workloads: Sequence[Workload],
    times: Sequence[Times],
    peaks: Peaks,
) -> list[Result]:
    """The measurements of one case, ours first."""
    kind, ours = work.WORKS[name], workloads[0].items / times[0].wall
    results = []
    for workload, timed in zip(workloads, times, strict=True):
        rates = kind.per * workload.items / timed.wall
        seconds, bytes_moved = float(np.median(timed.wall)), workload.bytes_moved
        results.append(
            Result(
                work=name,
                encoder=size.encoder,
                dtype=size.dtype,
                batch_size=size.batch_size,
                implementation=workload.implementation,
                unit=kind.unit,
                rate=float(np.median(rates)),
                low=float(rates.min()),
                high=float(rates.max()),
                per_processor_second=float(workload.items / np.median(timed.processor)),
                compile_seconds=workload.compile_seconds,
                warmup_seconds=timed.warmup,
                memory_bytes=workload.memory,
                flops_share=_share(workload.flops, seconds, peaks.flops[size.dtype]),
                bandwidth_share=_share(bytes_moved, seconds, peaks.bandwidth),
                bytes_per_item=None if bytes_moved is None else bytes_moved / workload.items,
                ratio=float(np.median(ours / (workload.items / timed.wall))),
                note=workload.note,
            )
        )
    return results


def _share(amount: float | None, seconds: float, peak: float) -> float | None:
    """Share of the peak rate; None if the amount is not known."""
    return None if amount is None else amount / seconds / peak


def _context(peaks: Peaks) -> dict[str, Any]:
    """Where and with what it was measured."""
    devices = jax.local_devices()
    return {
        "schema": 1,
        "date": time.strftime("%Y-%m-%d"),
        "platform": jax.default_backend(),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "peak_flops": peaks.flops,
        "peak_bandwidth": peaks.bandwidth,
        "left_out": [],
    }


def _version(package: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _peak_host_memory() -> int:
    """The process's largest resident memory in bytes, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


COLUMNS = (
    *("work", "encoder", "dtype", "batch", "implementation", "rate (smallest to largest)", "unit"),
    *(
        "ours over it",
        "MB per item",
        "per CPU-s",
        "compile s",
        "MiB",
        "of peak flops",
        "of peak bandwidth",
        "note",
    ),
)
"""Of the table, as `cells` gives them."""


def cells(result: Result) -> tuple[str, ...]:
    """Returns a result as the cells of a table."""
    share = lambda value: "" if value is None else f"{100 * value:.0f} %"
    return (
        result.work,
        result.encoder,
        result.dtype,
        str(result.batch_size),
        result.implementation,
        f"{result.rate:.4g} ({result.low:.4g} to {result.high:.4g})",
        result.unit,
        f"{result.ratio:.2f}",
        "" if result.bytes_per_item is None else f"{result.bytes_per_item / 1e6:.3g}",
        f"{result.per_processor_second:.3g}",
        f"{result.compile_seconds:.1f}",
        "" if result.memory_bytes is None else f"{result.memory_bytes / 2**20:.0f}",
        share(result.flops_share),
        share(result.bandwidth_share),
        result.note,
    )


def markdown(results: Sequence[Result]) -> str:
    """Returns the results as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
