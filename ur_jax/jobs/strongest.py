"""The strongest that is found: parts, numbers and table of the label-free job's stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax import metrics
from ur_jax.attacks import StrongConfig, StrongResult
from ur_jax.jobs.label_free_config import EvaluationConfig
from ur_jax.metrics import DistanceDistribution, Ranks
from ur_jax.metrics.checks import in_range
from ur_jax.runs import Run, write_table
from ur_jax.runs.summary import Row
from ur_jax.types import Array

STREAM, TARGETS = 7, 8
"""Streams of random numbers: of the attacks, and of whose representations are targets."""

NEIGHBOURS = 1024
"""Images of the bank, at most, that the attack on the nearest neighbour looks at."""


def part_name(eps: float) -> str:
    """Of the stage's parts."""
    return f"strongest_{eps:g}"


def columns(found: StrongResult, again: Array, config: StrongConfig) -> dict[str, Any]:
    """What is kept of a batch, per image and run (B,R); `again` is its clean one once more."""
    steps = np.array([config.members[name].num_steps for name, _ in config.runs], np.float32)
    lost = ~in_range(found.each)
    return {
        "representations": found.each,
        "distances": found.distances,
        "clean": found.clean,
        "again": jnp.max(jnp.abs(again - found.clean), axis=1),
        "growth": found.growth,
        "flat": found.zero_gradients.astype(jnp.float32) / steps,
        "zero_gradients": jnp.mean(found.zero_gradients.astype(jnp.float32) / steps, axis=1),
        "bad_gradients": jnp.sum(found.bad_gradients, axis=1),
        "lost": jnp.any(lost, axis=1),
    }


def rows(
    run: Run,
    distributions: Mapping[str, DistanceDistribution],
    bank: Mapping[str, np.ndarray],
    config: EvaluationConfig,
    mesh: Mesh,
) -> Iterator[Row]:
    """The worst of all runs on each image, by l2; writes `strongest.parquet`.

    Distances and ranks have each their own worst run.
    """
    tables = []
    for eps in config.strong_eps:
        part = run.read_parts(part_name(eps))
        runs = config.strong(eps).runs
        far = np.where(np.isfinite(part["distances"]), part["distances"], np.inf)
        ranks = _ranks(part, bank, mesh)
        worst, farthest = ranks.rank.max(axis=1), far.max(axis=1)
        whole = Ranks(worst, ranks.compared[:, 0])
        shares = metrics.universal_quantile(distributions["l2"], jnp.asarray(far))
        shares = np.where(np.isinf(far), 1.0, shares)
        values = {
            "strongest_universal_quantile": shares.max(axis=1),
            "strongest_normalised_distance": farthest / float(distributions["l2"].median),
            "strongest_breakaway_risk": metrics.breakaway_risk(whole),
            "strongest_top_1_accuracy": metrics.nearest_neighbour_hits(whole, k=1),
            "strongest_top_5_accuracy": metrics.nearest_neighbour_hits(whole, k=5),
        }
        for name, value in values.items():
            estimate = metrics.summarise(name, value)
            yield Row.of(name, estimate, divergence="l2", eps=eps, step=config.strong_steps)
        count = len(farthest)
        tables.append({
            "image": np.repeat(part["index"], len(runs)),
            "eps": np.full(count * len(runs), eps),
            "attack": np.tile([name for name, _ in runs], count),
            "start": np.tile([start for _, start in runs], count),
            "dist_l2": far.ravel(),
                "universal_quantile_l2": shares.ravel(),
            "rank": np.asarray(ranks.rank).ravel(),
            "compared": np.asarray(ranks.compared).ravel(),
            "zero_gradients": part["flat"].ravel(),
            "growth": part["growth"].ravel(),
        })  # fmt: skip
    joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    write_table(run.path / "strongest.parquet", joined)


def by_member(run: Run, config: EvaluationConfig) -> dict[str, dict[str, dict[str, float]]]:
    """{eps: {attack: its median distance, and on which share of the images it is the farthest}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for eps in config.strong_eps:
        part, strong = run.read_parts(part_name(eps)), config.strong(eps)
        far = of_members(part["distances"], strong).max(axis=2)  # (N,M)
        first = far.argmax(axis=1)
        found[f"{eps:g}"] = {
            name: {
                "median_distance": float(np.median(far[:, place])),
                "farthest_on": float(np.mean(first == place)),
            }
            for place, name in enumerate(strong.members)
        }
    return found


def of_members(values: np.ndarray, config: StrongConfig) -> np.ndarray:
    """Values of all runs (N,R) as those of each member's starts (N,M,S); what is not finite is
    infinite."""
    values = np.where(np.isfinite(values), values, np.inf)
    return values.reshape(len(values), len(config.members), config.num_restarts)


def _ranks(part: Mapping[str, np.ndarray], bank: Mapping[str, np.ndarray], mesh: Mesh) -> Ranks:
    """Ranks of all runs' representations (N,R) among the bank."""
    each = part["representations"]
    places = {index: row for row, index in enumerate(bank["index"])}
    own = np.array([places.get(index, -1) for index in part["index"]])
    num_runs = each.shape[1]
    ranks = metrics.neighbour_ranks(
        jnp.asarray(each.reshape(-1, each.shape[2])),
        jnp.asarray(np.repeat(part["clean"], num_runs, axis=0)),
        bank["clean"],
        own_index=np.repeat(own, num_runs),
        mesh=mesh,
    )
    return Ranks(*(jnp.reshape(values, (-1, num_runs)) for values in ranks))
