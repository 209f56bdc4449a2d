"""What compiling ahead found, as tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from rich import box
from rich.table import Table

from ur_jax.performance.ahead.compiling import Compiled
from ur_jax.performance.ahead.programs import Kernel
from ur_jax.performance.ahead.targets import Target

_GIB = 2**30


def table(target: Target, results: Sequence[Compiled]) -> Table:
    """The results, a line per function."""
    shown = Table(title=f"Compiled for {target.name}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("encoder, function", min_width=15)
    memory = "GiB" if target.memory is None else f"GiB of {target.memory / _GIB:.0f}"
    for column in ("per", "kernels", "GFLOP", "MB", "at most", memory):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("fits", min_width=4)
    for r in results:
        is_small = r.available is None or r.memory <= r.available
        shown.add_row(
            f"{r.encoder}, {r.function}",
            r.unit,
            f"{sum(k.times for k in r.kernels):,}",
            f"{r.flops / 1e9:.3g}",
            f"{r.bytes / 1e6:.3g}",
            "" if r.rate is None else f"{_short(r.rate)}/s",
            f"{r.memory / _GIB:.2f}",
            ("yes" if is_small else "NO") + (f"; in loops {listed(r.inner)}" if r.inner else ""),
        )
    shown.caption = (
        "kernels: of a call on one device; GFLOP and MB: per what the second column names; "
        "at most: by the roofline of each kernel, on all devices; GiB: of one device"
    )
    return shown


def kernel_table(target: Target, result: Compiled, most: int = 5) -> Table:
    """Where the time of one function goes by the roofline: kinds of kernels, and the longest."""
    shown = Table(title=f"{result.encoder}, {result.function}", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("kernels", "launches", "MB", "GFLOP", "of the time"):
        is_text = column == "kernels"
        shown.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text)
    share = len(target.devices) / result.items
    by_kind, by_source = defaultdict(list), defaultdict(list)
    for kernel in result.kernels:
        by_kind[kernel.kind].append(kernel)
        # Layers alike are one entry, such as block*/expand.
        source = re.sub(r"\d+", "*", kernel.source)
        by_source[f"{kernel.kind} {source} {kernel.result}"].append(kernel)

    def spent(group: Sequence[Kernel]) -> float:
        if target.chip is None:
            return sum(k.times * k.bytes for k in group)
        return sum(k.times * target.chip.seconds(k.bytes, k.flops, result.dtype) for k in group)

    total = spent(result.kernels) or 1.0
    for number, groups in enumerate((by_kind, by_source)):
        ranked = sorted(groups.items(), key=lambda item: -spent(item[1]))
        for name, group in ranked[: most if number else None]:
            shown.add_row(
                name,
                f"{sum(k.times for k in group):,}",
                f"{share * sum(k.times * k.bytes for k in group) / 1e6:.2f}",
                f"{share * sum(k.times * k.flops for k in group) / 1e9:.2f}",
                f"{100 * spent(group) / total:.0f} %",
            )
        shown.add_section()
    shown.caption = f"MB and GFLOP per {result.unit}"
    return shown


def listed(counts: dict[str, int]) -> str:
    """Collectives as text."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _short(value: float) -> str:
    """A number in three digits, with k, M or G for what is left out."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
