"""Tables on the terminal beside the one of a job (`runs.summary.table`)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ur_jax.stats.intervals import Estimate


class Measured(Protocol):
    """A rate, as `ur_jax.performance` measures it."""

    @property
    def work(self) -> str: ...
    @property
    def encoder(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def implementation(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def rate(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def ratio(self) -> float: ...
    @property
    def flops_share(self) -> float | None: ...
    @property
    def bandwidth_share(self) -> float | None: ...


def encoder_table(measures: Mapping[str, Mapping[str, Estimate]], encoders: Sequence[str]) -> Table:
    """A row per measure, a column per encoder: value and 95 % interval, as Markdown.

    Args:
      measures: {measure: {encoder: estimate}}; a missing one stays empty.
      encoders: the columns.
    """
    table = Table(box=box.MARKDOWN)
    table.add_column("measure", no_wrap=True)
    for encoder in encoders:
        table.add_column(Text(encoder), no_wrap=True)
    for measure, estimates in measures.items():
        shown = [_interval(estimates[e]) if e in estimates else "" for e in encoders]
        table.add_row(*map(Text, (measure, *shown)))
    return table


def as_markdown(table: Table) -> str:
    """The text of a table whose box is Markdown."""
    with io.StringIO() as file:
        Console(file=file, width=1000).print(table)
        return "\n".join(line.rstrip() for line in file.getvalue().strip().splitlines()) + "\n"


def throughput_table(title: str, results: Sequence[Measured]) -> Table:
    """Rows of what was measured, by whom, at which rate, and ours over it.

    Args:
      title: above the table.
      results: of `ur_jax.performance.run`.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("work", "with", "by"):
        table.add_column(column)
    for column in ("rate", "ours over it", "of peak flops", "of peak copy"):
        table.add_column(column, justify="right")
    for result in results:
        size = f"{result.encoder} {result.dtype} {result.batch_size}"
        rate = f"{result.rate:.4g} {result.unit}"
        shares = [
            "" if share is None else f"{100 * share:.0f} %"
            for share in (result.flops_share, result.bandwidth_share)
        ]
        ratio = f"{result.ratio:.2f}"
        table.add_row(result.work, size, result.implementation, rate, ratio, *shares)
    return table


def _interval(estimate: Estimate) -> str:
    """Value and interval in short."""
    value, low, high, _ = estimate
    if not math.isfinite(value):
        return "infinite"
    if not math.isfinite(low + high):
        return f"{value:.3f}"
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
