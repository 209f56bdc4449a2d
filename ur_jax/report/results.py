"""Figures of what a call returned: `summary.plot()`, `comparison.plot()`, for a notebook."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ur_jax.errors import UserError
from ur_jax.metrics import METRICS
from ur_jax.report import canvas, figures
from ur_jax.runs import SETTINGS, Row, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ur_jax.report.paired import Comparison

_AXES = ("step", "radius")
"""What a metric may be drawn against, if it was read at several."""
_MOST_COLUMNS = 3
_DECIDED, _OPEN = 1.0, 0.45  # how strong a bar is


def plot_summary(summary: Summary, divergence: str = "l2") -> Figure:
    """The numbers of a run with their intervals, a panel per metric.

    Args:
      summary: of the run.
      divergence: the one to show of several.

    Raises:
      UserError: if there is no number.
      MissingPackageError: without matplotlib, of the extra `report`.
    """
    panels: dict[str, list[Row]] = {}
    for row in summary.rows:
        if row.divergence in (None, divergence) and math.isfinite(row.value):
            panels.setdefault(row.metric, []).append(row)
    if not panels:
        raise UserError(f"Expected a summary with finite numbers, got none: {summary.title}.")
    columns = min(_MOST_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    with canvas.styled(figures.STYLE):
        figure, axes = canvas.new_figure(lines, columns, (3.2 * columns + 0.4, 2.3 * lines + 0.4))
        figure.suptitle(figures.label(summary.title), fontsize=10)
        for axis, (name, rows) in zip(axes.flat, panels.items()):
            metric = METRICS.get(name)
            robust = f"\n{metric.robust} is robust" if metric and metric.robust else ""
            axis.set_title(f"{name}{robust}", fontsize=9)
            _draw(axis, rows)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
    return canvas.in_notebook(figure)


def plot_comparison(comparison: Comparison) -> Figure:
    """On how many images each of two encoders is the more robust one, a bar per measure.

    Strong are the measures that decide, pale the others.

    Raises:
      UserError: if there is no verdict.
      MissingPackageError: without matplotlib, of the extra `report`.
    """
    pairs = dict.fromkeys((each.first, each.second) for each in comparison.verdicts)
    if not pairs:
        raise UserError("Expected verdicts to draw, got none: the runs have no image in common.")
    counts = [len(comparison.of(*pair)) for pair in pairs]
    with canvas.styled(figures.STYLE):
        size = (7.5, 0.32 * sum(counts) + 1.1 * len(pairs))
        figure, axes = canvas.new_figure(len(pairs), 1, size)
        for axis, pair in zip(axes[:, 0], pairs):
            _bars(axis, comparison, pair)
    return canvas.in_notebook(figure)


def _draw(axis: Any, rows: Sequence[Row]) -> None:
    """One metric: lines against the step or the radius, or points side by side."""
    varies = [name for name in _AXES if len({getattr(row, name) for row in rows}) > 1]
    against = varies[0] if varies else ""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        names = [n for n in SETTINGS[1:] if n != against and getattr(row, n) is not None]
        settings = [(name, getattr(row, name)) for name in names]
        text = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings)
        lines.setdefault(text, []).append(row)
    for place, (text, points) in enumerate(lines.items()):
        look = figures.look(place)
        x = [getattr(row, against) for row in points] if against else [place]
        low, high = ([row.value - _end(row, "low") for row in points],
                     [_end(row, "high") - row.value for row in points])  # fmt: skip
        axis.errorbar(
            x, [row.value for row in points], (low, high),
            color=look.color, linestyle=look.line, marker=look.marker, markersize=4, capsize=2,
            label=text,
        )  # fmt: skip
    if against:
        axis.set_xlabel(against)
        axis.locator_params("x", integer=against == "step", nbins=5)
        if len(lines) > 1:
            axis.legend(fontsize=7)
        return
    axis.set_xticks(range(len(lines)), [text.replace(", ", "\n") for text in lines], fontsize=7)
    axis.set_xlim(-0.6, len(lines) - 0.4)


def _end(row: Row, name: str) -> float:
    """An end of the interval; the value itself where there is none."""
    end = getattr(row, name)
    return end if math.isfinite(end) else row.value


def _bars(axis: Any, comparison: Comparison, pair: tuple[str, str]) -> None:
    """Two encoders: shares of the images, per measure."""
    found = comparison.of(*pair)[::-1]
    for place, verdict in enumerate(found):
        wins, n = verdict.wins, verdict.result.n
        first, second = (wins[name] / n for name in pair)
        alpha = _DECIDED if verdict.winner else _OPEN
        axis.barh(place, -first, color=figures.look(0).color, alpha=alpha)
        axis.barh(place, second, color=figures.look(1).color, alpha=alpha)
        if verdict.winner is None:
            axis.annotate("not decided", (1.0, place), fontsize=7, ha="right", va="center")
    titles = [" ".join((v.column.column.title, v.column.setting)) for v in found]
    axis.set_yticks(range(len(found)), titles, fontsize=8)
    axis.axvline(0.0, color="#808080", linewidth=1)
    axis.set(xlim=(-1, 1), xlabel="share of the images on which it is more robust")
    axis.set_xticks([-1, -0.5, 0, 0.5, 1], ["100 %", "50 %", "0", "50 %", "100 %"])
    first, second = map(figures.label, pair)
    axis.set_title(f"← {first}          {second} →", fontsize=9)
