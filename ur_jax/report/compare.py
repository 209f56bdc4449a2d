"""What differs between encoders: columns of the tables, the best, and rank correlations.

Which metrics have a column, and of which rows, is declared with the metrics (`metrics.METRICS`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

from ur_jax.metrics import METRICS, Column
from ur_jax.report.collect import Number
from ur_jax.runs import Row
from ur_jax.stats.intervals import Estimate


class Compared(NamedTuple):
    """A column of a table.

    Attributes:
      stage: which stage of each encoder reports it.
      metric: its name in `metrics.METRICS`.
      column: what it shows.
      setting: what it was measured under, for the heading.
      robust: "low", "high" or "".
      cells: {encoder: the number}.
    """

    stage: str
    metric: str
    column: Column
    setting: str
    robust: str
    cells: Mapping[str, Row]


class Correlation(NamedTuple):
    """Rank correlation over encoders: Spearman's rho, Kendall's tau with its p-value, and n."""

    rho: float
    tau: float
    p_value: float
    n: int


def columns(numbers: Sequence[Number], *, labels: bool) -> list[Compared]:
    """The columns of the table with, or without, labels; by l2, at the last step that was read."""
    found = []
    for name, metric in METRICS.items():
        for column in metric.columns:
            if not column.headline or column.labels != labels:
                continue
            groups: dict[tuple, list[Number]] = {}
            for number in numbers:
                if number.row.metric == name and _is_of(column, number):
                    setting = number.row.eps, number.row.radius, number.row.images
                    groups.setdefault((number.stage, *setting), []).append(number)
            for group in groups.values():
                last = max(number.row.step or 0 for number in group)
                cells = {n.encoder: n.row for n in group if (n.row.step or 0) == last}
                setting = _setting(group[0].row, last)
                stage = group[0].stage
                found.append(Compared(stage, name, column, setting, metric.robust, cells))
    return found


def best(rows: Sequence[Row], robust: str) -> int | None:
    """Which of several encoders is best, where the intervals bear it out.

    Args:
      rows: one number of each encoder.
      robust: "low" or "high"; "" where neither is.

    Returns:
      Its position, if its whole interval lies on the robust side of every other one's; None
      otherwise, and where there is only one, or one lacks an interval. With k encoders that are
      equal, such an outcome by chance has a probability below 5 %, for each metric.
    """
    if len(rows) < 2 or not robust:
        return None
    if not all(math.isfinite(end) for row in rows for end in (row.low, row.high)):
        return None
    sign = 1.0 if robust == "high" else -1.0
    near = [min(sign * row.low, sign * row.high) for row in rows]
    far = [max(sign * row.low, sign * row.high) for row in rows]
    first = max(range(len(rows)), key=near.__getitem__)
    others = [end for i, end in enumerate(far) if i != first]
    return first if near[first] > max(others) else None


def correlations(
    numbers: Sequence[Number],
) -> Iterator[tuple[Compared, Compared, Correlation | None, int]]:
    """Every metric without labels against every one with: (column, column, correlation, n).

    n counts the encoders that have both.
    """
    with_labels = columns(numbers, labels=True)
    for first in columns(numbers, labels=False):
        for second in with_labels:
            common = sorted(set(first.cells) & set(second.cells))
            x, y = ([each.cells[name].value for name in common] for each in (first, second))
            yield first, second, rank_correlation(x, y), len(common)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Correlation | None:
    """Rank correlation of two metrics over encoders.

    Args:
      first: one value per encoder; NaN for none. An infinite one has the first or last rank.
      second: of the other metric, in the same order.

    Returns:
      The correlation over encoders that have both values; None for fewer than 3, or where one
      metric is the same for all.
    """
    pairs = [pair for pair in zip(first, second, strict=True) if not any(map(math.isnan, pair))]
    if len(pairs) < 3 or any(len(set(values)) < 2 for values in zip(*pairs)):
        return None
    x, y = (stats.rankdata(values) for values in zip(*pairs))
    rho: Any = stats.spearmanr(x, y)
    tau: Any = stats.kendalltau(x, y)
    return Correlation(float(rho.statistic), float(tau.statistic), float(tau.pvalue), len(pairs))


def headline(numbers: Sequence[Number]) -> dict[str, dict[str, Estimate]]:
    """All of l2 at the last step, {measure: {encoder: estimate}}, for `terminal.encoder_table`."""
    last: dict[tuple, int] = {}
    for number in numbers:
        key = number.stage, number.row.metric, number.row.eps
        last[key] = max(last.get(key, 0), number.row.step or 0)
    table: dict[str, dict[str, Estimate]] = {}
    for encoder, stage, summary, row in numbers:
        if row.divergence not in ("l2", None):
            continue
        if summary.job != "impersonate" and (row.step or 0) < last[stage, row.metric, row.eps]:
            continue
        # A probe on its own kind of images; impersonation in both directions together.
        if row.images not in (None, "both", stage.removeprefix("probe-")):
            continue
        settings = {name: getattr(row, name) for name in ("eps", "step", "radius")}
        shown = ", ".join(f"{k} {v:g}" for k, v in settings.items() if v is not None)
        name = f"{stage}: {row.metric}{f' ({shown})' if shown else ''}"
        table.setdefault(name, {})[encoder] = row.estimate
    return table


def _is_of(column: Column, number: Number) -> bool:
    """Whether a number belongs to a column of its metric."""
    if number.summary.job != column.job or number.row.divergence not in (None, "l2"):
        return False
    return column.shown(number.row, number.summary.identity)


def _setting(row: Row, step: int) -> str:
    """What a column was measured under, for its heading."""
    parts = [] if row.eps is None else [f"eps {row.eps:g}"]
    parts += [f"step {step}"] if step else []
    parts += [] if row.radius is None else [f"radius {row.radius:g}"]
    return ", ".join([*parts, *([row.images] if row.images else [])])
