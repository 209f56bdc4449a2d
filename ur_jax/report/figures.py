"""Figures that compare encoders, for a page on light or dark ground and for papers.

A job says what there is to draw (`jobs.base.Curve`), `gather` puts the curves of all encoders
together, `draw` makes a figure of them. `save` writes it as PNG and PDF, `to_svg` returns markup
whose text and axes take the colour of the text around it.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ur_jax.jobs import JOBS
from ur_jax.metrics import METRICS
from ur_jax.report import canvas
from ur_jax.report.collect import Results
from ur_jax.runs import atomic_path
from ur_jax.types import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panels = Mapping[str, Mapping[str, Curve]]
"""{panel: {name: curve}} of one figure: an encoder's, named after it, and what its `series` is."""


class Look(NamedTuple):
    """How an encoder is drawn in every figure: told from others by colour, and without it."""

    color: str
    line: str
    marker: str


_INK = "#26262b"
# Legible on white and on near-black; hues that colour-blind readers tell apart (Okabe and Ito).
_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#3f9fd8", "#8c6bb1", "#808080"),
)
_LINES = ("-", "--", "-.", ":")
_MARKERS = "os^DvPX*"
_LONGEST_LABEL = 40
STYLE = {
    **{name: _INK for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in an encoder's name is one
    "svg.fonttype": "none",
    "svg.hashsalt": "ur_jax",
    "pdf.fonttype": 42,
}


def gather(
    found: Results,
) -> tuple[dict[str, dict[str, dict[str, Curve]]], list[str]]:
    """The curves of all stages, as their jobs give them.

    Args:
      found: what is in a working directory.

    Returns:
      {figure: {panel: {encoder: curve}}} in the order of the metrics, and a line for each stage
      whose curves cannot be drawn.
    """
    order: dict[str, int] = {}
    for metric in METRICS.values():
        for column in metric.columns:
            order.setdefault(column.job, len(order))
    place = lambda item: (order.get(item[1].job, len(order)), item[0])
    stages = sorted(found.summaries.items(), key=place)
    figures: dict[str, dict[str, dict[str, Curve]]] = {}
    problems = []
    for (encoder, stage), summary in stages:
        job = JOBS.get(summary.job)
        if job is None:
            problems.append(
                f"{encoder}/{stage}: there is no job {summary.job!r}, so that its curves are not "
                "drawn; name its file by --plugin."
            )
            continue
        folder = found.folders[encoder, stage]
        changed = summary.damaged_tables(folder)
        if changed:
            tables = ", ".join(str(folder / name) for name in changed)
            problems.append(f"{tables}: not as written with summary.json; no curves are drawn.")
            continue
        try:
            curves = list(job.curves(folder, summary, found.siblings(encoder, stage)))
        except (OSError, ValueError, KeyError) as error:  # of a table that is damaged or not there
            problems.append(f"{encoder}/{stage}: no curves are drawn. {error}")
            continue
        for curve in curves:
            if not len(curve.x):
                problems.append(f"{encoder}/{stage}: its curve {curve.panel!r} has no point.")
                continue
            panel = figures.setdefault(curve.figure, {}).setdefault(curve.panel, {})
            series = f", {curve.series}" if curve.series else ""
            taken = f"{encoder}{series}" in panel
            panel[f"{encoder}/{stage}{series}" if taken else f"{encoder}{series}"] = curve
    return figures, problems


def draw(panels: Panels, encoders: Sequence[str]) -> Figure:
    """One figure: a panel each with a line per encoder; of points, a panel per encoder.

    Args:
      panels: the curves.
      encoders: all of them, so that each looks the same in every figure.
    """
    curves = [curve for by_encoder in panels.values() for curve in by_encoder.values()]
    if curves[0].kind == "points":
        return _points(panels)
    names = _names(panels, encoders)
    with canvas.styled(STYLE):
        size = (4.75 * max(len(panels), 1.3), 3.8)
        figure, axes = canvas.new_figure(1, len(panels), size)
        handles: dict[str, Any] = {}
        series: dict[str, Any] = {}
        for axis, (title, by_name) in zip(axes[0], panels.items()):
            first = next(iter(by_name.values()))
            axis.set(xlabel=first.x_label, ylabel=first.y_label)
            if all(np.all(curve.x == np.round(curve.x)) for curve in by_name.values()):
                axis.locator_params("x", integer=True)
            if len(panels) > 1:
                axis.set_title(title)
            marks = {name: curve for name, curve in by_name.items() if curve.kind == "mark"}
            lines = {name: curve for name, curve in by_name.items() if name not in marks}
            add = _add_steps if _is_step(by_name) else _add_lines
            marked, found = _add_marks(axis, names, marks)  # first, as lines fix the axis at 0
            handles = marked | handles | add(axis, names, lines)  # a line rather than a mark
            series |= found
        order = sorted(handles)
        figure.legend(
            [*(handles[name] for name in order), *series.values()],
            [*map(label, order), *series],
            loc="outside right center",
            fontsize=8,
        )
    return figure


def owner(name: str, curve: Curve) -> str:
    """Whose a curve is: its name in a panel without its series."""
    return name.removesuffix(f", {curve.series}") if curve.series else name


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PATH.png and PATH.pdf, on white, the same bytes every time."""
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        target = path.with_name(f"{path.name}.{suffix}")
        with atomic_path(target) as temporary, canvas.styled(STYLE):
            figure.savefig(temporary, format=suffix, dpi=200, facecolor="white", metadata=metadata)


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element; the page's style finds its width as `--natural`."""
    text = io.StringIO()
    with canvas.styled(STYLE):
        figure.savefig(text, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    markup = text.getvalue()
    markup = markup[markup.index("<svg") :].replace(_INK, "currentColor")
    width = 72 * figure.get_size_inches()[0]
    return markup.replace("<svg", f'<svg style="--natural: {width:.0f}pt"', 1)


def data_of(figure: Figure, panels: Panels, encoders: Sequence[str]) -> dict[str, Any]:
    """What a pointer over the figure's SVG needs to tell values, as JSON values; {} for points.

    Args:
      figure: of `draw`, after `to_svg`, which lays it out.
      panels, encoders: what it was drawn of.

    Returns:
      {"panels": of each its box in the figure (left, top, right, bottom as shares), the limits of
      its axes, its labels, and of each curve its name, whose it is, colour, points and the ids of
      its elements}.
    """
    curves = [curve for by_encoder in panels.values() for curve in by_encoder.values()]
    if curves[0].kind == "points":
        return {}
    names = _names(panels, encoders)
    found = []
    for axis, by_encoder in zip(figure.axes, panels.values()):
        box, first = axis.get_position(), next(iter(by_encoder.values()))
        found.append(
            {
                "box": [box.x0, 1 - box.y1, box.x1, 1 - box.y0],
                "x": {"label": first.x_label, "limits": axis.get_xlim()},
                "value": {"label": first.y_label, "limits": axis.get_ylim()},
                "is_step": _is_step(by_encoder),
                "curves": [
                    {
                        "name": name,
                        "owner": owner(name, curve),
                        "color": _look(names, name, curve).color,
                        "is_mark": curve.kind == "mark",
                        "id": _identifier(curve, names, name),
                        "x": _plain(curve.x),
                        "value": _plain(curve.value),
                        "low": [] if curve.low is None else _plain(curve.low),
                        "high": [] if curve.high is None else _plain(curve.high),
                    }
                    for name, curve in by_encoder.items()
                ],
            }
        )
    return {"panels": found}


def _plain(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON; None where one is not finite."""
    return [rounded(v) if math.isfinite(v) else None for v in values.tolist()]


def rounded(value: float) -> float:
    """A number as the page has it: five digits."""
    return float(f"{value:.5g}")


def _identifier(curve: Curve, names: Sequence[str], name: str) -> str:
    """Of the elements of a curve: no two alike on a page, and no character of a name in it."""
    place = f"{curve.figure} {curve.panel} {curve.series}".encode()
    return f"c{zlib.crc32(place):08x}-{names.index(owner(name, curve))}"


def _names(panels: Panels, encoders: Sequence[str]) -> list[str]:
    """Whose curves are drawn, the encoders first; how they look is by their place here."""
    drawn = {owner(name, curve) for each in panels.values() for name, curve in each.items()}
    return [*encoders, *sorted(drawn - {*encoders})]


def _is_step(curves: Mapping[str, Curve]) -> bool:
    """Whether a panel has step functions."""
    return any(curve.kind == "step" for curve in curves.values())


def _add_lines(axis: Axes, names: Sequence[str], curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Draws curves with their intervals; returns what the legend shows of each."""
    handles = {}
    for name, curve in curves.items():
        styled, identifier = _styled(names, name, curve), _identifier(curve, names, name)
        [handles[name]] = axis.plot(curve.x, curve.value, linewidth=1.5, gid=identifier, **styled)
        if curve.low is not None and curve.high is not None:
            finite = np.isfinite(curve.low) & np.isfinite(curve.high)
            axis.fill_between(
                curve.x, curve.low, curve.high, where=finite, color=styled["color"],
                alpha=_alpha(curves), linewidth=0, gid=f"{identifier}-band",
            )  # fmt: skip
    if all(np.nanmin(curve.value, initial=0.0) >= 0.0 for curve in curves.values()):
        axis.set_ylim(bottom=0.0)
    return handles


def _alpha(curves: Mapping[str, Curve]) -> float:
    """How opaque bands are: many of them, that lie over each other, less."""
    return 0.12 if len(curves) <= 4 else 0.05


def _add_steps(axis: Axes, names: Sequence[str], curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Draws shares as step functions; returns what the legend shows of each."""
    ends = [float(x) for curve in curves.values() for x in curve.x[-1:] if np.isfinite(x)]
    right = max(ends, default=0.0)
    right = 1.05 * right if right > 0 else 1.0
    handles = {}
    for name, curve in curves.items():
        x, y = np.append(curve.x, right), np.append(curve.value, curve.value[-1])
        styled, identifier = _styled(names, name, curve), _identifier(curve, names, name)
        [handles[name]] = axis.step(x, y, where="post", gid=identifier, **styled)
        if curve.low is not None and curve.high is not None:
            low, high = (np.append(end, end[-1]) for end in (curve.low, curve.high))
            axis.fill_between(
                x, low, high, step="post", color=styled["color"], alpha=_alpha(curves), linewidth=0,
                gid=f"{identifier}-band",
            )  # fmt: skip
    axis.set(ylim=(-0.02, 1.02), xlim=(0.0, right))
    return handles


def _add_marks(
    axis: Axes, names: Sequence[str], curves: Mapping[str, Curve]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draws single points, hollow, with their intervals.

    Returns:
      What the legend shows of each encoder, and of each series.
    """
    handles, series = {}, {}
    hollow: dict[str, Any] = {"linestyle": "none", "markersize": 7, "markerfacecolor": "none"}
    for name, curve in curves.items():
        look, identifier = _look(names, name, curve), _identifier(curve, names, name)
        shown = np.isfinite(curve.value)
        value = curve.value[shown]
        ends = (curve.value if end is None else end for end in (curve.low, curve.high))
        low, high = (np.where(np.isfinite(end[shown]), end[shown], value) for end in ends)
        drawn = axis.errorbar(
            curve.x[shown], value, (value - low, high - value),
            color=look.color, marker=look.marker, capsize=2, **hollow,
        )  # fmt: skip
        line, caps, bars = drawn.lines
        line.set_gid(identifier)
        for number, artist in enumerate((*caps, *bars)):
            artist.set_gid(f"{identifier}-band-{number}")
        handles[owner(name, curve)] = line
        [series[curve.series]] = axis.plot([], [], color=_INK, marker="o", **hollow)
    return handles, series


def _points(panels: Panels) -> Figure:
    """Points, a panel per encoder, with the share of them below 0."""
    shown = {
        name if len(panels) == 1 else f"{name}, {panel}": curve
        for panel, by_encoder in panels.items()
        for name, curve in by_encoder.items()
    }
    num_columns = min(5, max(3, len(shown)))
    num_rows = math.ceil(len(shown) / num_columns)
    size = (1.9 * num_columns + 0.6, 1.9 * num_rows + 0.5)
    with canvas.styled(STYLE):
        figure, axes = canvas.new_figure(num_rows, num_columns, size, sharex=True, sharey=True)
        for axis, (name, curve) in zip(axes.flat, shown.items()):
            axis.axhline(0.0, color="#d55e00", linewidth=1)
            axis.scatter(
                curve.x, curve.value, s=4, alpha=0.4, color=_COLORS[0], lw=0, rasterized=True
            )
            share = float(np.mean(curve.value < 0)) if len(curve.value) else math.nan
            axis.set_title(f"{label(name)}\n{share:.1%} below 0", fontsize=8)
        for axis in axes.flat[len(shown) :]:
            axis.set_axis_off()
        first = next(iter(shown.values()))
        figure.supxlabel(first.x_label, fontsize=9)
        figure.supylabel(first.y_label, fontsize=9)
    return figure


def label(name: str) -> str:
    """A name that can be drawn: on one line, without what is no character, and not too long."""
    visible = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in name]
    text = "".join(visible)
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"


def _look(names: Sequence[str], name: str, curve: Curve) -> Look:
    """Of the encoder whose curve it is."""
    return look(names.index(owner(name, curve)))


def look(place: int) -> Look:
    """Of the encoder, or whatever else, at a place in a legend; the first 32 are all different."""
    lap, color = divmod(place, len(_COLORS))
    return Look(_COLORS[color], _LINES[(place + lap) % len(_LINES)], _MARKERS[color])


def _styled(names: Sequence[str], name: str, curve: Curve) -> dict[str, Any]:
    """A line's settings; its markers, a few, stand beside those of other lines."""
    place = names.index(owner(name, curve))
    found = look(place)
    start = 0.02 + 0.025 * (place % len(_MARKERS))
    marks = {"marker": found.marker, "markersize": 4, "markevery": (start, 0.22)}
    if not np.isfinite(curve.x + curve.value).any():
        marks = {}  # matplotlib cannot place them where there is no point
    return {"color": found.color, "linestyle": found.line, **marks}
