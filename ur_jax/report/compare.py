"""What a report compares between encoders: columns of its tables, curves of its figures.

Reads a working directory (see `results`) and returns plain numbers; `figures` draws them and `page`
writes them down. Nothing is recomputed: curves are medians and shares of the per-image tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ur_jax import runs
from ur_jax.report import collect as results
from ur_jax.stats.intervals import median_interval

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Headline:
    """A metric that the report shows in its tables.

    Attributes:
      title: heading.
      stage: the stage it is of, or what the stage's name begins with before "-".
      metric: its name.
      labels: whether it takes labels.
      radii: of a certified accuracy: which ones; all by default.
    """

    title: str
    stage: str
    metric: str
    labels: bool = False
    radii: tuple[float, ...] | None = None


HEADLINES = (
    Headline("universal quantile", "attacks", "universal_quantile"),
    Headline("universal quantile, targeted", "attacks", "universal_quantile_targeted"),
    Headline("relative distance, targeted", "attacks", "relative_quantile"),
    Headline("breakaway risk", "breakaway", "breakaway_risk"),
    Headline("nearest neighbour, top 1", "breakaway", "top_1_accuracy"),
    Headline("margin ratio", "overlap", "adversarial_margin"),
    Headline("overlap risk", "overlap", "overlap_risk"),
    Headline("certified divergence, quantile", "certified-divergence", "median_quantile"),
    Headline("share with a certificate", "certified-divergence", "certified"),
    Headline("probe's accuracy, top 1", "probe", "top_1_accuracy", labels=True),
    Headline("certified accuracy", "certified-accuracy", "certified_accuracy", True, (0.0, 0.25)),
    Headline("average certified radius", "certified-accuracy", "average_certified_radius", True),
    Headline("impersonation", "impersonation", "impersonation_success", labels=True),
)


class Column(NamedTuple):
    """A column of a table: what it shows, and the number of each encoder that has one."""

    headline: Headline
    setting: str
    robust: str
    cells: dict[str, Mapping[str, Any]]


class Curve(NamedTuple):
    """A curve of one encoder: x, the value, and the ends of its interval or None."""

    x: np.ndarray
    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def columns(rows: Rows, *, labels: bool) -> list[Column]:
    """The columns of the table with, or without, labels; by l2, at the last step that was read."""
    found = []
    for headline in HEADLINES:
        if headline.labels != labels:
            continue
        groups: dict[tuple, list[Mapping[str, Any]]] = {}
        for row in rows:
            if _is_shown(headline, row):
                setting = tuple(row[name] for name in ("eps", "radius", "images"))
                groups.setdefault((row["stage"], *setting), []).append(row)
        for group in groups.values():
            last = max(row["step"] or 0 for row in group)
            cells = {row["encoder"]: row for row in group if (row["step"] or 0) == last}
            robust = results.ROBUST.get(headline.metric, "")
            found.append(Column(headline, _setting(group[0], last), robust, cells))
    return found


def attack_curves(workdir: Path, summaries: Mapping, eps: float) -> dict[str, dict[str, Curve]]:
    """Distance against step at one eps: {mode: {encoder: curve of the median over images}}.

    Untargeted, in units of the encoder's median clean distance; an encoder without the stage
    "distances" is left out. Targeted, relative to the distance at the start. Both l2, with the
    95 % interval over the images.
    """
    curves: dict[str, dict[str, Curve]] = {"untargeted": {}, "targeted": {}}
    for encoder, stage in summaries:
        if not stage.startswith("attacks"):
            continue
        table = _read(workdir, encoder, stage, "attacks", ("eps", "mode", "step", "dist_l2"))
        for mode, by_encoder in curves.items():
            chosen = (table["mode"] == mode) & np.isclose(table["eps"], eps)
            if not chosen.any():
                continue
            # Rows are written image after image, each from step 0 on.
            num_steps = int(table["step"][chosen].max()) + 1
            distances = table["dist_l2"][chosen].reshape(-1, num_steps).astype(np.float64)
            if mode == "targeted":
                scale = distances[:, :1]
                if not (scale > 0).all():  # two copies of an image
                    distances, scale = (x[scale[:, 0] > 0] for x in (distances, scale))
            else:
                scale = median_clean_distance(summaries, encoder)
                if scale is None:
                    continue
            estimates = [median_interval(column) for column in (distances / scale).T]
            value, low, high, _ = np.array(estimates).T
            by_encoder[encoder] = Curve(np.arange(num_steps), value, low, high)
    return curves


def attack_radii(rows: Rows) -> list[float]:
    """Every eps of the attacks."""
    return sorted({row["eps"] for row in rows if row["stage"].startswith("attacks")})


def margins(workdir: Path, summaries: Mapping) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{encoder: (clean distance of pairs in units of the median clean one, margin ratio)}, l2."""
    found = {}
    for encoder, stage in summaries:
        scale = median_clean_distance(summaries, encoder)
        if stage == "overlap" and scale is not None:
            table = _read(workdir, encoder, stage, "pairs", ("clean_dist_l2", "margin_l2"))
            finite = np.isfinite(table["margin_l2"])
            found[encoder] = table["clean_dist_l2"][finite] / scale, table["margin_l2"][finite]
    return found


def accuracy_curves(workdir: Path, summaries: Mapping) -> dict[str, Curve]:
    """{encoder: certified accuracy against the l2 radius}, a step function."""
    found = {}
    for encoder, stage in summaries:
        if stage == "certified-accuracy":
            names = ("radius", "abstained", "predicted", "label")
            table = _read(workdir, encoder, stage, "certificates", names)
            correct = ~table["abstained"] & (table["predicted"] == table["label"])
            found[encoder] = _survival(np.where(correct, table["radius"], -1.0))
    return found


def divergence_curves(workdir: Path, summaries: Mapping, column: str) -> dict[str, Curve]:
    """{encoder: share of images whose certified divergence is at most x}, a step function.

    Args:
      workdir: the working directory.
      summaries: of `results.collect`.
      column: "quantile" (of clean distances) or "normalised" (by their median).
    """
    found = {}
    for encoder, stage in summaries:
        if stage == "certified-divergence":
            table = _read(workdir, encoder, stage, "certificates", ("abstained", column))
            values = np.sort(table[column][~table["abstained"]].astype(np.float64))
            total = len(table["abstained"])
            x = np.concatenate([[0.0], values])
            found[encoder] = Curve(x, np.arange(len(x)) / total)
    return found


def correlations(rows: Rows) -> Iterator[tuple[Column, Column, results.Correlation | None, int]]:
    """Every metric without labels against every one with: (column, column, correlation, n).

    n counts the encoders that have both.
    """
    with_labels = columns(rows, labels=True)
    for first in columns(rows, labels=False):
        for second in with_labels:
            common = sorted(set(first.cells) & set(second.cells))
            values = ([column.cells[e]["value"] for e in common] for column in (first, second))
            yield first, second, results.rank_correlation(*values), len(common)


def median_clean_distance(summaries: Mapping, encoder: str) -> float | None:
    """The encoder's median clean l2 distance, of its stage "distances"; None without it."""
    summary = summaries.get((encoder, "distances"))
    for row in summary["metrics"] if summary else ():
        if (row["metric"], row["divergence"]) == ("median_clean_distance", "l2"):
            return row["value"] or None
    return None


def _is_shown(headline: Headline, row: Mapping[str, Any]) -> bool:
    """Whether a number belongs to a column of a headline."""
    stage, _, kind = row["stage"].partition("-")
    if headline.stage not in (stage, row["stage"]) or headline.metric != row["metric"]:
        return False
    if row["divergence"] not in (None, "l2"):
        return False
    if stage == "probe" and row["images"] != kind:
        return False
    if stage == "impersonation" and row["images"] != "both":
        return False
    return headline.radii is None or row["radius"] in headline.radii


def _setting(row: Mapping[str, Any], step: int) -> str:
    """What a column was measured under, for its heading."""
    parts = [] if row["eps"] is None else [f"eps {row['eps']:g}"]
    parts += [f"step {step}"] if step else []
    parts += [] if row["radius"] is None else [f"radius {row['radius']:g}"]
    return ", ".join(parts + ([row["images"]] if row["stage"].startswith("probe") else []))


def _survival(values: np.ndarray) -> Curve:
    """Share of images whose value is at least x, for x >= 0; a negative value is none."""
    total, values = len(values), np.sort(values[values >= 0].astype(np.float64))
    if not len(values):
        return Curve(np.zeros(1), np.zeros(1))
    # Just after the i-th smallest value, len - i - 1 images are left.
    x = np.concatenate([[0.0], values])
    left = np.concatenate([[len(values)], len(values) - 1 - np.arange(len(values))])
    return Curve(x, left / total)


def _read(
    workdir: Path, encoder: str, stage: str, table: str, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Some columns of a stage's table."""
    return runs.read_table(workdir / encoder / stage / f"{table}.parquet", names)
