"""From the tables of a label-free run to the values per image that its numbers sum up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ur_jax import runs
from ur_jax.jobs.label_free_tables import DIVERGENCES, WORST, best_until
from ur_jax.types import Values

Histories = dict[tuple[str, str | None], np.ndarray]
"""{(metric, divergence): values (N,T)}."""


def attack_values(
    folder: Path, protocol: Mapping[str, Any], scale: float | None
) -> Iterator[Values]:
    """Of the attacks at each eps and step, by each divergence.

    Args:
      folder: of the run.
      protocol: its settings.
      scale: median clean l2 distance, the unit of the normalised one, which is left out without it.
    """
    table = runs.read_table(folder / "attacks.parquet")
    num_steps = int(table["step"].max()) + 1  # rows are image after image, each from step 0 on
    for eps in protocol["eps"]:
        for mode in ("untargeted", "targeted"):
            chosen = (table["mode"] == mode) & (table["eps"] == eps)
            columns = {k: v[chosen].reshape(-1, num_steps) for k, v in table.items()}
            lost = ~np.isfinite(best_until(columns, "dist_l2"))
            for (metric, d), value in _histories(columns, mode, scale).items():
                worst = np.where(lost, WORST[metric], value)
                for step in protocol["read_at"]:
                    index = columns["image"][:, step]
                    yield Values(metric, index, worst[:, step], d, eps=eps, step=step)


def _histories(columns: Mapping[str, np.ndarray], mode: str, scale: float | None) -> Histories:
    """The values of one kind of attack at one eps."""
    shares = {d: columns[f"universal_quantile_{d}"] for d in DIVERGENCES}
    moved = {d: best_until(columns, f"dist_{d}").astype(np.float64) for d in DIVERGENCES}
    found: Histories
    if mode == "untargeted":
        found = {("universal_quantile", d): shares[d] for d in DIVERGENCES}
        found[("cosine_similarity", None)] = best_until(columns, "cosine_similarity")
        if scale is not None:
            found[("normalised_distance", "l2")] = moved["l2"] / scale
        return found
    found = {("universal_quantile_targeted", d): shares[d] for d in DIVERGENCES}
    with np.errstate(divide="ignore", invalid="ignore"):
        for d, distance in moved.items():
            start = distance[:, :1]
            found[("relative_quantile", d)] = np.where(start == 0.0, math.nan, distance / start)
    return found


def breakaway_values(folder: Path, protocol: Mapping[str, Any]) -> Iterator[Values]:
    """Breakaway risk and neighbour accuracy, by l2."""
    table = runs.read_table(folder / "neighbours.parquet")
    under = {"eps": protocol["breakaway_eps"], "step": protocol["breakaway_steps"]}
    rank, compared = table["rank"], table["compared"].astype(np.float64)
    found = {"breakaway_risk": rank / compared, "top_1_accuracy": rank < 1}
    for name, value in (found | {"top_5_accuracy": rank < 5}).items():
        yield Values(name, table["image"], np.asarray(value, np.float64), "l2", **under)


def strongest_values(
    folder: Path, protocol: Mapping[str, Any], scale: float | None
) -> Iterator[Values]:
    """Of the worst run on each image, by l2; `scale` as in `attack_values`."""
    table = runs.read_table(folder / "strongest.parquet")
    for eps in protocol["strong_eps"]:
        columns = {name: column[table["eps"] == eps] for name, column in table.items()}
        index = columns["image"]
        first = np.flatnonzero(np.append(True, index[1:] != index[:-1]))  # an image's runs follow
        of_worst = {
            name: np.maximum.reduceat(columns[name].astype(np.float64), first)
            for name in ("rank", "compared", "universal_quantile_l2", "dist_l2")
        }
        rank = of_worst["rank"]
        found = {
            "strongest_universal_quantile": of_worst["universal_quantile_l2"],
            "strongest_breakaway_risk": rank / of_worst["compared"],
            "strongest_top_1_accuracy": (rank < 1).astype(np.float64),
            "strongest_top_5_accuracy": (rank < 5).astype(np.float64),
        }
        if scale is not None:
            found["strongest_normalised_distance"] = of_worst["dist_l2"] / scale
        for name, value in found.items():
            yield Values(name, index[first], value, "l2", eps=eps, step=protocol["strong_steps"])


def overlap_values(folder: Path, protocol: Mapping[str, Any]) -> Iterator[Values]:
    """Margins and overlap risk of pairs, by each divergence."""
    table = runs.read_table(folder / "pairs.parquet")
    under = {"eps": protocol["overlap_eps"], "step": protocol["overlap_steps"]}
    index = np.stack([table["first"], table["second"]], 1)
    for d in DIVERGENCES:
        margin = table[f"margin_{d}"].astype(np.float64)
        below = np.where(np.isnan(margin), np.nan, margin < 0)
        yield Values("adversarial_margin", index, margin, d, **under)
        yield Values("overlap_risk", index, below, d, **under)
