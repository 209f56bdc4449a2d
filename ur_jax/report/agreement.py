"""Whether measures without labels rank encoders as probes do: a figure of rank correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ur_jax.report import canvas, figures
from ur_jax.report.compare import Compared, Correlation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "rank-correlation"
"""Of the figure and its files."""

CAPTION = (
    "Spearman's rank correlation, over encoders, of each measure without labels with the accuracy "
    "of each probe, turned so that at 1 the most robust encoder is also the best, and at -1 the "
    "worst. Hollow: a p-value of 5 % or more (of Kendall's tau, not corrected for the many pairs)."
)
_X = "rank correlation with the probe, 1: the same order"


class Agreement(NamedTuple):
    """Rank correlations of measures without labels with those of probes.

    Attributes:
      measures: (R,) of each row, what it is and what it was measured under, "" where unsaid.
      probes: {kind of the probe: its correlation with each measure (R,), None without}; the sign of
        rho and tau is that of agreement, see `oriented`.
    """

    measures: list[tuple[str, str]]
    probes: dict[str, list[Correlation | None]]


def oriented(first: Compared, second: Compared, found: Correlation) -> Correlation:
    """A correlation whose sign tells agreement: positive where the robust rank as the good do.

    Args:
      first, second: measures, each of which says which direction is robust or good.
      found: their correlation.
    """
    sign = -1.0 if {first.robust, second.robust} == {"low", "high"} else 1.0
    return found._replace(rho=sign * found.rho, tau=sign * found.tau)


def with_probes(
    pairs: Sequence[tuple[Compared, Compared, Correlation | None, int]],
) -> Agreement | None:
    """What is to be drawn of `compare.correlations`; None where nothing correlates with a probe."""
    rows: dict[tuple[str, str], dict[str, Correlation | None]] = {}
    for first, second, found, _ in pairs:
        if second.column.job != "probe" or not (first.robust and second.robust):
            continue
        row = rows.setdefault((first.column.title, first.setting), {})
        row[second.setting] = found and oriented(first, second, found)
    kept = {name: row for name, row in rows.items() if any(row.values())}
    if not kept:
        return None
    kinds = dict.fromkeys(kind for row in kept.values() for kind in row)
    by_kind = {kind: [row.get(kind) for row in kept.values()] for kind in kinds}
    return Agreement(list(kept), {kind: r for kind, r in by_kind.items() if any(r)})


def draw(found: Agreement) -> Figure:
    """A row per measure, a mark per probe; hollow where the p-value is 5 % or more."""
    num_rows = len(found.measures)
    with canvas.styled(figures.STYLE):
        figure, [[axis]] = canvas.new_figure(1, 1, (8.0, 0.42 * num_rows + 1.0))
        for x, line in ((-1.0, ":"), (0.0, "-"), (1.0, ":")):
            axis.axvline(x, color="#808080", linewidth=0.8, linestyle=line)
        for row in range(1, num_rows):
            axis.axhline(row - 0.5, color="#808080", linewidth=0.3, alpha=0.5)
        handles = []
        for place, each in enumerate(found.probes.values()):
            look, identifier = figures.look(place), _identifier(place)
            at = np.array([math.nan if r is None else r.rho for r in each])
            y = np.arange(num_rows) + _shift(place, len(found.probes))
            sure = np.array([r is not None and r.p_value < 0.05 for r in each])
            style: dict[str, Any] = {"color": look.color, "marker": look.marker, "linestyle": ""}
            axis.plot(at[sure], y[sure], gid=identifier, **style)
            hollow = {"gid": f"{identifier}-band", "markerfacecolor": "none"}
            axis.plot(at[~sure], y[~sure], **style, **hollow)
            handles += axis.plot([], [], **style)
        axis.set(xlim=(-1.05, 1.05), ylim=(num_rows - 0.5, -0.5), xlabel=_X)
        names = ["\n".join(map(figures.label, filter(None, each))) for each in found.measures]
        axis.set_yticks(range(num_rows), names, fontsize=8)
        axis.tick_params("y", length=0)
        figure.legend(
            handles, [figures.label(f"probe, {kind}") for kind in found.probes],
            loc="outside right center", fontsize=8,
        )  # fmt: skip
    return figure


def data_of(figure: Figure, found: Agreement) -> dict[str, Any]:
    """What a pointer tells, as `figures.data_of`; the panel has "rows", and its x has no meaning.

    Args:
      figure: of `draw`, after `figures.to_svg`, which lays it out.
      found: what it was drawn of.
    """
    [axis] = figure.axes
    box = axis.get_position()
    curves = [
        {
            "name": f"probe, {kind}",
            "owner": f"probe, {kind}",
            "color": figures.look(place).color,
            "id": _identifier(place),
            "value": [None if r is None else figures.rounded(r.rho) for r in each],
            "told": ["" if r is None else _told(r) for r in each],
        }
        for place, (kind, each) in enumerate(found.probes.items())
    ]
    rows = [", ".join(filter(None, each)) for each in found.measures]
    panel = {"box": [box.x0, 1 - box.y1, box.x1, 1 - box.y0], "rows": rows}
    return {"panels": [panel | {"curves": curves}]}


def _told(found: Correlation) -> str:
    """The rest of a correlation."""
    return f"tau {found.tau:.2f}, p {found.p_value:.2g}, n = {found.n}"


def _shift(place: int, count: int) -> float:
    """How far a mark is moved within its row, so that equal ones stand below each other."""
    return 0.0 if count < 2 else 0.5 * (place / (count - 1) - 0.5)


def _identifier(place: int) -> str:
    """Of the elements of a probe."""
    return f"c-{NAME}-{place}"
