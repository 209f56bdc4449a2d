"""From the parts of a label-free run to its numbers, its per-image tables and its curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax import metrics, runs
from ur_jax.data import evenly_spaced
from ur_jax.jobs.base import Curve
from ur_jax.metrics import DistanceDistribution
from ur_jax.runs import Run, write_table
from ur_jax.runs.summary import Row, Summary
from ur_jax.stats.intervals import Estimate, median_interval

if TYPE_CHECKING:
    from ur_jax.jobs.label_free import EvaluationConfig

DIVERGENCES = ("l1", "l2", "linf")
HISTORY = (
    *(f"dist_{name}" for name in DIVERGENCES),
    "cosine_similarity",
    *(f"perturb_{name}" for name in DIVERGENCES),
)
BEST = tuple(f"best_{name}" for name in HISTORY[:4])
"""What is kept beside it, and read, of attacks that return the best point that they pass."""
DISTRIBUTION = 6
"""The stream of random numbers that shuffles the bank."""

_NO_VALUE = "two copies of an image, with no ratio to their distance of 0"
_LEVELS = np.arange(1, 1000) / 1000
WORST = {
    "cosine_similarity": -1.0,
    "universal_quantile": 1.0,
    "normalised_distance": math.inf,
    "universal_quantile_targeted": 0.0,
    "relative_quantile": 0.0,
}
"""The value of an attacked image whose representation is NaN or infinite."""
_NUM_NEIGHBOURS = 5
_MOVED = "distance moved / median clean distance"

Bank = Mapping[str, np.ndarray]


def distributions(bank: Bank, config: EvaluationConfig) -> dict[str, DistanceDistribution]:
    """Distribution of clean distances by each divergence, over evenly spaced images of the bank."""
    clean = bank["clean"]
    wanted = len(clean) if config.num_distribution is None else config.num_distribution
    chosen = jnp.asarray(clean[evenly_spaced(len(clean), min(wanted, len(clean)))])
    key = jax.random.fold_in(jax.random.key(config.seed), DISTRIBUTION)
    return {d: metrics.distance_distribution(chosen, key, divergence=d) for d in DIVERGENCES}


def distance_rows(
    run: Run,
    distributions: Mapping[str, DistanceDistribution],
    bank: Bank,
    config: EvaluationConfig,
) -> Iterator[Row]:
    """Median clean distances; writes the quantiles of the distribution to `distances.parquet`.

    No interval: pairs share images, so they are not independent.
    """
    columns = {"level": _LEVELS}
    for d, distribution in distributions.items():
        columns[f"dist_{d}"] = np.quantile(np.asarray(distribution.distances), _LEVELS)
        count = min(config.num_distribution or len(bank["clean"]), len(bank["clean"]))
        estimate = Estimate(float(distribution.median), math.nan, math.nan, count)
        yield Row.of("median_clean_distance", estimate, divergence=d)
    write_table(run.path / "distances.parquet", columns)


def attack_rows(
    run: Run, distributions: Mapping[str, DistanceDistribution], config: EvaluationConfig
) -> Iterator[Row]:
    """Numbers of the attacks at each eps and step; writes `attacks.parquet`."""
    tables = []
    for eps in config.eps:
        for mode in ("untargeted", "targeted"):
            part = run.read_parts(f"{mode}_{eps:g}")
            values: dict[str, dict[Any, Any]] = {
                "cosine_similarity": {None: best_until(part, "cosine_similarity")}
            }
            far = {d: best_until(part, f"dist_{d}") for d in DIVERGENCES}
            shares = {
                d: metrics.universal_quantile(
                    distributions[d], far[d], nearest_level=config.nearest_level
                )
                for d in DIVERGENCES
            }
            if mode == "untargeted":
                values["universal_quantile"] = shares
                values["normalised_distance"] = {
                    d: metrics.normalised_distance(distributions[d], far[d]) for d in DIVERGENCES
                }
            else:
                del values["cosine_similarity"]  # robust is high against the clean image only
                values["universal_quantile_targeted"] = shares
                values["relative_quantile"] = {d: _relative(far[d]) for d in DIVERGENCES}
            for name, by_divergence in values.items():
                for d, value in by_divergence.items():
                    worst = np.where(_lost(part), WORST[name], np.asarray(value))
                    for step in config.read_at:
                        at_step = worst[:, step]
                        yield _summarised(name, at_step, divergence=d, eps=eps, step=step)
            tables.append(_attack_columns(part, mode, eps, shares))
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    write_table(run.path / "attacks.parquet", columns)


def _relative(distances: np.ndarray) -> np.ndarray:
    """Distances (N,T) relative to those of the start; NaN for two copies of an image."""
    start = distances[:, :1]
    return np.where(start == 0.0, np.nan, metrics.relative_quantile(distances, start))


def best_until(part: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """What is read of an attack (N,T): of the best point until each step, if that is kept."""
    return part[f"best_{name}" if f"best_{name}" in part else name]


def _lost(part: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether an attacked image was NaN or infinitely far, at each step (N,T)."""
    return ~np.isfinite(best_until(part, "dist_l2"))


def breakaway_rows(run: Run, bank: Bank, config: EvaluationConfig, mesh: Mesh) -> Iterator[Row]:
    """Breakaway risk and neighbour accuracy, by l2; writes `neighbours.parquet`."""
    part = run.read_parts("breakaway")
    places = {index: row for row, index in enumerate(bank["index"])}
    ranks = metrics.neighbour_ranks(
        jnp.asarray(part["attacked"]),
        jnp.asarray(part["clean"]),
        bank["clean"],
        own_index=np.array([places.get(index, -1) for index in part["index"]]),
        mesh=mesh,
    )
    values = {
        "breakaway_risk": metrics.breakaway_risk(ranks),
        "top_1_accuracy": metrics.nearest_neighbour_hits(ranks, k=1),
        "top_5_accuracy": metrics.nearest_neighbour_hits(ranks, k=5),
    }
    columns = {"image": part["index"], "rank": ranks.rank, "compared": ranks.compared}
    write_table(
        run.path / "neighbours.parquet", {name: np.asarray(x) for name, x in columns.items()}
    )
    for name, value in values.items():
        yield _summarised(
            name, value, divergence="l2", eps=config.breakaway_eps, step=config.breakaway_steps
        )


def overlap_rows(run: Run, config: EvaluationConfig) -> Iterator[Row]:
    """Margins and overlap risk; writes `pairs.parquet`."""
    part = run.read_parts("overlap")
    columns = {"first": part["index"], "second": part["second"]}
    for d in DIVERGENCES:
        columns |= {name: part[name] for name in (f"margin_{d}", f"clean_dist_{d}")}
        margins = part[f"margin_{d}"]
        is_below = np.where(np.isnan(margins), np.nan, margins < 0)
        for name, value in (("adversarial_margin", margins), ("overlap_risk", is_below)):
            yield _summarised(
                name, value, divergence=d, eps=config.overlap_eps, step=config.overlap_steps
            )
    write_table(run.path / "pairs.parquet", columns)


def gallery(run: Run, bank: Bank, mesh: Mesh) -> dict[str, np.ndarray]:
    """The shown images, attacked, and the clean images nearest to either: indices "before" and
    "after" the attack (S,K)."""
    shown_images, part = run.read_parts("gallery"), run.read_parts("breakaway")
    shown = part["index"]
    rows = [np.flatnonzero(shown == index)[0] for index in shown_images["index"] if index in shown]
    k = min(_NUM_NEIGHBOURS, len(bank["clean"]))
    queries = jnp.concatenate([part["clean"][rows], part["attacked"][rows]])
    nearest = metrics.nearest_neighbours(queries, bank["clean"], k=k, mesh=mesh)
    before, after = np.split(bank["index"][np.asarray(nearest.indices)], 2)
    keep = np.isin(shown_images["index"], shown)
    kept = {name: value[keep] for name, value in shown_images.items()}
    return kept | {"before": before, "after": after}


def median_clean_distance(summaries: Iterable[Summary]) -> float | None:
    """The encoder's median clean l2 distance, of whichever summary has it; None without one."""
    for summary in summaries:
        for row in summary.rows:
            if (row.metric, row.divergence) == ("median_clean_distance", "l2"):
                return row.value or None
    return None


def attack_curves(folder: Path, scale: float | None) -> Iterator[Curve]:
    """Median distance over the images against the step, with its 95 % interval, l2.

    Args:
      folder: of the run.
      scale: the median clean distance, the unit of untargeted attacks, left out without it;
        targeted ones are relative to the distance at the start.
    """
    table = runs.read_table(folder / "attacks.parquet")
    for eps in np.unique(table["eps"]):
        for mode, label in (
            ("untargeted", _MOVED),
            ("targeted", "distance to the target / that at the start"),
        ):
            chosen = (table["mode"] == mode) & (table["eps"] == eps)
            if not chosen.any() or (mode == "untargeted" and scale is None):
                continue
            # Rows are written image after image, each from step 0 on.
            num_steps = int(table["step"][chosen].max()) + 1
            distances = (
                best_until(table, "dist_l2")[chosen].reshape(-1, num_steps).astype(np.float64)
            )
            worst = WORST["relative_quantile"] if mode == "targeted" else math.inf
            if mode == "targeted":
                distances = distances[distances[:, 0] != 0]  # two copies of an image have none
                relative = distances / distances[:, :1]
            else:
                assert scale is not None
                relative = distances / scale
            relative = np.where(np.isfinite(distances), relative, worst)
            estimates = [median_interval(column) for column in relative.T]
            value, low, high, _ = np.array(estimates).T
            yield Curve(
                *_panel(mode, eps), "attack step", label,
                "Median over images, with its interval. Untargeted: robust is low; at 1 the image "
                "has moved as far as two unrelated images are apart. Targeted: robust is high.",
                np.arange(num_steps), value, low, high,
            )  # fmt: skip


def strongest_curves(folder: Path, scale: float | None, num_steps: int) -> Iterator[Curve]:
    """Median over the images of the farthest that any run of the strongest attack moved each.

    Only the ends of its runs are kept, so it is one point in the panel of the untargeted attack.

    Args:
      folder, scale: as of `attack_curves`; nothing without a scale.
      num_steps: of each of its runs.
    """
    table = runs.read_table(folder / "strongest.parquet", ("image", "eps", "dist_l2"))
    for eps in np.unique(table["eps"]) if scale is not None else ():
        chosen = table["eps"] == eps
        index, far = table["image"][chosen], table["dist_l2"][chosen].astype(np.float64)
        first = np.flatnonzero(np.append(True, index[1:] != index[:-1]))  # an image's runs follow
        value, low, high, _ = median_interval(np.maximum.reduceat(far, first) / scale)
        yield Curve(
            *_panel("untargeted", eps), "attack step", _MOVED,
            "Hollow, with its interval: the strongest attack found, of all its attacks and starts "
            "the one that moves an image farthest. On record are only the ends of its runs, so it "
            "stands at the number of their steps.",
            np.array([num_steps]), *map(np.atleast_1d, (value, low, high)), kind="mark",
            series="strongest found",
        )  # fmt: skip


def _panel(mode: str, eps: float) -> tuple[str, str]:
    """Names of the figure and of the panel that distances by an attack are drawn in."""
    return f"distance-eps-{eps:g}", f"{mode}, eps {eps:g}"


def margin_curve(folder: Path, scale: float) -> Curve:
    """Margin ratio of each pair against its clean distance in units of the median one, l2."""
    table = runs.read_table(folder / "pairs.parquet", ("clean_dist_l2", "margin_l2"))
    finite = np.isfinite(table["margin_l2"])
    return Curve(
        "margin-ratio", "margin ratio", "clean distance of the pair / median clean distance",
        "margin ratio",
        "Pairs of images, each attacked towards the other. Below 0 the attacked images have passed "
        "each other.",
        table["clean_dist_l2"][finite] / scale, table["margin_l2"][finite], kind="points",
    )  # fmt: skip


def _attack_columns(part, mode, eps, shares) -> dict[str, np.ndarray]:
    """One row per image and step."""
    num_images, num_steps = part["dist_l2"].shape
    return {
        "image": np.repeat(part["index"], num_steps),
        "mode": np.full(num_images * num_steps, mode),
        "target": np.repeat(part.get("target", np.full(num_images, -1)), num_steps),
        "eps": np.full(num_images * num_steps, eps),
        "step": np.tile(np.arange(num_steps), num_images),
        **{name: part[name].ravel() for name in (*HISTORY, *BEST) if name in part},
        **{f"universal_quantile_{d}": np.asarray(share).ravel() for d, share in shares.items()},
    }


def _summarised(metric: str, values, **settings) -> Row:
    """The row of the values that are defined; it tells how many are not, and why.

    An infinite value, the worst, is one of them.
    """
    values = np.asarray(values)
    defined = ~np.isnan(values)
    if not defined.all():
        settings |= {"n_excluded": int(np.sum(~defined)), "excluded": _NO_VALUE}
    return Row.of(metric, metrics.summarise(metric, values[defined]), **settings)
