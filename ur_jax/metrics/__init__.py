"""Label-free measures of robustness, each a function of representations or of their distances.

They return one value per image (or pair). `summarise` turns those into the reported number with
its interval, and `METRICS` says which number that is and which way robustness points. Breakaway
risk and nearest-neighbour accuracy come from the same count, `neighbour_ranks`, which passes a
bank of any size through the devices block by block.
"""

from ur_jax.metrics.distributions import (
    DistanceDistribution,
    adversarial_margin,
    distance_distribution,
    normalised_distance,
    overlap_risk,
    pairwise_within,
    relative_quantile,
    universal_quantile,
)
from ur_jax.metrics.neighbours import (
    Neighbours,
    knn_accuracy,
    knn_classify,
    nearest_neighbours,
)
from ur_jax.metrics.ranks import (
    Ranks,
    RankState,
    breakaway_risk,
    finish_ranks,
    init_ranks,
    nearest_neighbour_hits,
    neighbour_ranks,
    update_ranks,
)
from ur_jax.metrics.registry import METRICS, Column, Metric, summarise

__all__ = [
    "METRICS",
    "Column",
    "DistanceDistribution",
    "Metric",
    "Neighbours",
    "RankState",
    "Ranks",
    "adversarial_margin",
    "breakaway_risk",
    "distance_distribution",
    "finish_ranks",
    "init_ranks",
    "knn_accuracy",
    "knn_classify",
    "nearest_neighbour_hits",
    "nearest_neighbours",
    "neighbour_ranks",
    "normalised_distance",
    "overlap_risk",
    "pairwise_within",
    "relative_quantile",
    "summarise",
    "universal_quantile",
    "update_ranks",
]
