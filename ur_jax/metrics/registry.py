"""Which number is reported of a measure, with its interval, and which way robustness points."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ur_jax.errors import UserError, unknown_name
from ur_jax.stats.intervals import Estimate, mean_interval, median_interval, proportion_interval


class Metric(NamedTuple):
    """How per-image values become a reported number, and which direction is robust."""

    statistic: str  # "median", "mean" or "proportion"
    robust: str  # "low" or "high"
    meaning: str


METRICS: dict[str, Metric] = {
    "universal_quantile": Metric("median", "low", "F(distance), untargeted attack"),
    "universal_quantile_targeted": Metric("median", "high", "F(distance to target)"),
    "relative_quantile": Metric("median", "high", "distance to target, now / at the start"),
    "normalised_distance": Metric("median", "low", "distance / median F, untargeted attack"),
    "cosine_similarity": Metric("median", "high", "cosine of clean and attacked, untargeted"),
    "breakaway_risk": Metric("mean", "low", "share of images nearer than the own clean one"),
    "top_1_accuracy": Metric("proportion", "high", "own clean image is the nearest"),
    "top_5_accuracy": Metric("proportion", "high", "own clean image is among the 5 nearest"),
    "adversarial_margin": Metric("median", "high", "margin ratio of a pair attacked both ways"),
    "overlap_risk": Metric("proportion", "low", "margin ratio < 0"),
}


def summarise(name: str, values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """The reported number of one metric, with n and its confidence interval.

    Args:
      name: a key of `METRICS`; its `statistic` selects the interval (`ur_jax.stats.intervals`).
      values: what the metric's function returned, one per independent image or pair [n].
      confidence: coverage of the interval, in (0, 1).

    Returns:
      value, low, high, n.

    Raises:
      ValueError: for an unknown metric, no values, NaN or infinite values, or values other than
        0 and 1 for a proportion.
    """
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    if METRICS[name].statistic == "median":
        return median_interval(values, confidence=confidence)
    if METRICS[name].statistic == "mean":
        return mean_interval(values, confidence=confidence)
    values = np.asarray(values, np.float64).ravel()
    bad = int(np.count_nonzero((values != 0.0) & (values != 1.0)))
    if bad:
        raise UserError(f"Expected {name} of 0 or 1 per image, got {bad} others of {values.size}.")
    return proportion_interval(int(values.sum()), values.size, confidence=confidence)
