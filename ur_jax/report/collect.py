"""All numbers of a working directory as one table.

A working directory holds one folder per encoder and stage, `WORKDIR/ENCODER/STAGE`, which one
script's run fills. Its `summary.json` carries the numbers as rows of one form, see `row`; here they
become one table. No time and no path enters it, so it is the same, byte for byte, whatever
interrupted the runs.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from ur_jax import runs
from ur_jax.errors import UserError
from ur_jax.metrics import METRICS
from ur_jax.stats.intervals import Estimate

SETTINGS = ("divergence", "eps", "step", "radius", "images")
"""What a number was measured under; empty where it does not apply."""

COLUMNS = (
    *("schema", "encoder", "stage", "metric", *SETTINGS),
    *("value", "low", "high", "n", "config", "weights"),
)
"""Columns of the table: `schema` is `runs.SCHEMA`, `config` and `weights` are hashes."""

ROBUST = {
    **{name: metric.robust for name, metric in METRICS.items()},
    "certified": "high",
    "certified_accuracy": "high",
    "average_certified_radius": "high",
    "average_certified_radius_correct_only": "high",
    "mean_radius": "high",
    "median_eps_out": "low",
    "median_quantile": "low",
    "median_normalised": "low",
    "impersonation_success": "low",
}
"""Which direction is robust (of a probe's accuracy: better), by metric."""

_AT_RADIUS = " at radius "


class Results(NamedTuple):
    """What is in a working directory.

    Attributes:
      rows: one dict of `COLUMNS` per number, by encoder and stage.
      summaries: {(encoder, stage): contents of its summary.json}.
      damaged: {(encoder, stage): why its summary could not be read}.
    """

    rows: list[dict[str, Any]]
    summaries: dict[tuple[str, str], dict[str, Any]]
    damaged: dict[tuple[str, str], str]


class Correlation(NamedTuple):
    """Rank correlation over encoders: Spearman's rho, Kendall's tau with its p-value, and n."""

    rho: float
    tau: float
    p_value: float
    n: int


def row(metric: str, estimate: Estimate, **settings: Any) -> dict[str, Any]:
    """One number as `summary.json` has it under "metrics".

    Args:
      metric: its name.
      estimate: value, 95 % interval, n.
      **settings: of `SETTINGS`.

    Returns:
      {"metric", *SETTINGS, "value", "low", "high", "n"}, None where a setting does not apply.
    """
    assert set(settings) <= set(SETTINGS), settings
    unset = dict.fromkeys(SETTINGS)
    return {"metric": metric, **unset, **settings, **estimate._asdict()}


def named_rows(estimates: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    """Rows of estimates by name; "NAME at radius R" becomes the metric NAME at the radius R."""
    found = []
    for title, estimate in estimates.items():
        name, _, radius = title.partition(_AT_RADIUS)
        settings = {"radius": float(radius)} if radius else {}
        found.append(row(name.replace(",", "").replace(" ", "_"), estimate, **settings))
    return found


def collect(workdir: Path) -> Results:
    """Reads every `WORKDIR/ENCODER/STAGE/summary.json`.

    Args:
      workdir: the working directory.

    Returns:
      What was found; a summary that cannot be read is named in `damaged`, not raised.

    Raises:
      ValueError: if the directory does not exist.
    """
    if not workdir.is_dir():
        raise UserError(f"Expected a working directory, found none at {workdir}.")
    table, summaries, damaged = [], {}, {}
    for path in sorted(workdir.glob("*/*/summary.json")):
        encoder, stage = path.parts[-3:-1]
        try:
            summary = json.loads(path.read_text())
            if summary["schema"] != runs.SCHEMA:
                raise UserError(
                    f"Expected schema {runs.SCHEMA}, got {summary['schema']}: of another "
                    "version of ur_jax. Run the stage again."
                )
            table += _table_rows(encoder, stage, summary)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            damaged[encoder, stage] = f"{type(error).__name__}: {error}"
        else:
            summaries[encoder, stage] = summary
    return Results(table, summaries, damaged)


def fingerprint(summary: Mapping[str, Any]) -> str:
    """Hash of the configuration of a summary, but for where its probe lies."""
    return runs.fingerprint({k: v for k, v in summary["config"].items() if k != "probe"})


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows of `COLUMNS` as CSV, atomically; an unset entry or a number not finite is empty.

    Numbers are written in full, so that reading gives the same float.
    """
    with runs.atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def best(rows: Sequence[Mapping[str, Any]], robust: str) -> int | None:
    """Which of several encoders is best, where the intervals bear it out.

    Args:
      rows: one number of each encoder, with "value", "low" and "high".
      robust: "low" or "high".

    Returns:
      Its position, if its whole interval lies on the robust side of every other one's; None
      otherwise, and where there is only one, or one lacks an interval. With k encoders that are
      equal, such an outcome by chance has a probability below 5 %, for each metric.
    """
    if len(rows) < 2 or any(not _is_number(r[end]) for r in rows for end in ("low", "high")):
        return None
    sign = 1.0 if robust == "high" else -1.0
    near = [min(sign * r["low"], sign * r["high"]) for r in rows]
    far = [max(sign * r["low"], sign * r["high"]) for r in rows]
    first = max(range(len(rows)), key=near.__getitem__)
    others = [end for i, end in enumerate(far) if i != first]
    return first if near[first] > max(others) else None


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Correlation | None:
    """Rank correlation of two metrics over encoders.

    Args:
      first: one value per encoder.
      second: of the other metric, in the same order.

    Returns:
      The correlation over encoders that have both values; None for fewer than 3, or where one
      metric is the same for all.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if _is_number(a) and _is_number(b)]
    if len(pairs) < 3 or any(len(set(values)) < 2 for values in zip(*pairs)):
        return None
    x, y = zip(*pairs)
    tau = stats.kendalltau(x, y)
    return Correlation(
        float(stats.spearmanr(x, y).statistic), float(tau.statistic), float(tau.pvalue), len(pairs)
    )


def _table_rows(encoder: str, stage: str, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of `COLUMNS` of one summary."""
    config = fingerprint(summary)
    weights = str(summary["config"].get("weights_sha256", ""))[:16]
    place = {"schema": summary["schema"], "encoder": encoder, "stage": stage}
    found = []
    for number in summary["metrics"]:
        settings = {name: number.get(name) for name in SETTINGS}
        values = {name: number[name] for name in ("value", "low", "high", "n")}
        hashes = {"config": config, "weights": weights}
        found.append({**place, "metric": number["metric"], **settings, **values, **hashes})
    return found


def _is_number(value: Any) -> bool:
    """Whether a value is there and finite."""
    return value is not None and math.isfinite(value)
