"""Figures that compare encoders, for a page on light or dark ground and for papers.

Each function returns a matplotlib figure. `save` writes it as PNG and PDF, `to_svg` returns markup
whose text and axes take the colour of the text around it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from ur_jax.report.compare import Curve
from ur_jax.runs import atomic_path

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)
from matplotlib.figure import Figure  # noqa: E402

_INK = "#26262b"
# Legible on white and on near-black; hues that colour-blind readers tell apart (Okabe and Ito).
_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#3f9fd8", "#8c6bb1", "#808080"),
)
_LINES = ("-", "--", ":")
_STYLE = {
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
    "svg.fonttype": "none",
    "svg.hashsalt": "ur_jax",
    "pdf.fonttype": 42,
}


def distance_figure(
    curves: Mapping[str, Mapping[str, Curve]], eps: float, names: Sequence[str]
) -> Figure:
    """Distance against attack step: a panel per mode, a line per encoder.

    Args:
      curves: from `comparison.attack_curves`.
      eps: of these attacks.
      names: all encoders, so that each looks the same in every figure.
    """
    labels = {
        "untargeted": "distance moved / median clean distance",
        "targeted": "distance to the target / that at the start",
    }
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
        for axis, (mode, by_encoder) in zip(axes, curves.items()):
            for name, curve in by_encoder.items():
                _line(axis, names, name, curve)
            axis.set(title=f"{mode}, eps {eps:g}", xlabel="attack step", ylabel=labels[mode])
            axis.set_ylim(bottom=0.0)
        _legend(figure, axes)
    return figure


def margin_figure(margins: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Margin ratio against the clean distance of the pair, a panel per encoder.

    Args:
      margins: from `comparison.margins`.
    """
    num_columns = min(5, max(3, len(margins)))
    num_rows = math.ceil(len(margins) / num_columns)
    size = (1.9 * num_columns + 0.6, 1.9 * num_rows + 0.5)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            num_rows, num_columns, figsize=size, sharex=True, sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axis, (name, (clean, margin)) in zip(axes.flat, margins.items()):
            axis.axhline(0.0, color="#d55e00", linewidth=1)
            axis.scatter(clean, margin, s=4, alpha=0.4, color=_COLORS[0], lw=0, rasterized=True)
            risk = float(np.mean(margin < 0)) if len(margin) else math.nan
            axis.set_title(f"{name}\n{risk:.1%} below 0", fontsize=8)
        for axis in axes.flat[len(margins) :]:
            axis.set_axis_off()
        figure.supxlabel("clean distance of the pair / median clean distance", fontsize=9)
        figure.supylabel("margin ratio", fontsize=9)
    return figure


def step_figure(
    panels: Sequence[tuple[str, Mapping[str, Curve]]], label: str, names: Sequence[str]
) -> Figure:
    """Shares of images as step functions: a line per encoder.

    Args:
      panels: (label of x, {encoder: curve}) each.
      label: of y.
      names: all encoders, so that each looks the same in every figure.
    """
    with plt.rc_context(_STYLE):
        size = (4.75 * max(len(panels), 1.3), 3.8)
        figure, axes = plt.subplots(
            1, len(panels), figsize=size, squeeze=False, layout="constrained"
        )
        for axis, (x_label, curves) in zip(axes[0], panels):
            right = max((float(curve.x[-1]) for curve in curves.values()), default=0.0)
            right = 1.05 * right if right > 0 else 1.0
            for name, curve in curves.items():
                x, y = np.append(curve.x, right), np.append(curve.value, curve.value[-1])
                color, line = _look(names, name)
                axis.step(x, y, where="post", color=color, linestyle=line, label=name)
            axis.set(xlabel=x_label, ylabel=label, ylim=(-0.02, 1.02), xlim=(0.0, right))
        _legend(figure, axes[0])
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PATH.png and PATH.pdf, on white, the same bytes every time."""
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        with atomic_path(path.with_name(f"{path.name}.{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix, dpi=200, facecolor="white", metadata=metadata)


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element, and closes it."""
    text = io.StringIO()
    with plt.rc_context(_STYLE):
        figure.savefig(text, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    markup = text.getvalue()
    return markup[markup.index("<svg") :].replace(_INK, "currentColor")


def _line(axis, names, name, curve) -> None:
    """Draws one encoder's curve with its interval."""
    color, line = _look(names, name)
    axis.plot(curve.x, curve.value, color=color, linestyle=line, label=name, linewidth=1.5)
    if curve.low is not None:
        finite = np.isfinite(curve.low) & np.isfinite(curve.high)
        axis.fill_between(
            curve.x, curve.low, curve.high, where=finite, color=color, alpha=0.12, linewidth=0
        )


def _look(names: Sequence[str], name: str) -> tuple[str, str]:
    """Colour and line of an encoder."""
    place = list(names).index(name)
    return _COLORS[place % len(_COLORS)], _LINES[place // len(_COLORS) % len(_LINES)]


def _legend(figure: Figure, axes) -> None:
    """One legend for all panels, on the right."""
    found: dict[str, object] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles))
    if found:
        order = sorted(found)
        handles = [found[name] for name in order]
        figure.legend(handles, order, loc="outside right center", fontsize=8)
