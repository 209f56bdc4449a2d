"""Two encoders on the same images: the difference image by image, with its interval and test.

The interval and the p-value of one comparison agree: one excludes no difference where the other is
below 1 - confidence, but for values that are equal on many images, where the interval is the more
careful of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ur_jax.errors import UserError
from ur_jax.stats.intervals import Estimate, median_interval

_NUM_DRAWS = 10_000


class Paired(NamedTuple):
    """How one encoder differs from another on the same images.

    Attributes:
      difference: first - second: the median over the images of a metric that is a median, the mean
        of one that is a mean or a share; with its interval.
      p_value: of the two-sided test that there is none.
      higher, lower, equal: on how many images the first one's value is higher, lower, the same.
    """

    difference: Estimate
    p_value: float
    higher: int
    lower: int
    equal: int

    @property
    def n(self) -> int:
        """How many images."""
        return self.difference.n

    def more_images(self, level: float) -> int | None:
        """How many more images would decide, if what was seen on these held on them.

        A normal approximation: the test's score grows as the root of the number of images.

        Args:
          level: p-value at which it is decided, in (0, 1).

        Returns:
          0 if it is decided; None where nothing was seen, or a hundred times as many would not do.
        """
        if self.p_value <= level:
            return 0
        seen, wanted = stats.norm.isf(0.5 * self.p_value), stats.norm.isf(0.5 * level)
        if seen <= 0.1 * wanted:
            return None
        return max(1, math.ceil(self.n * (wanted / seen) ** 2) - self.n)


def compare(
    first: ArrayLike,
    second: ArrayLike,
    *,
    statistic: Literal["median", "mean", "proportion"],
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
    seed: int = 0,
) -> Paired:
    """Compares two encoders by one number per image of each.

    Medians: the median of the differences, with its exact order-statistic interval and the sign
    test; nothing is assumed of their distribution. Means and shares: Gaffke's bounds on the mean of
    the differences, which lie in [lower - upper, upper - lower] of `bounds`. For shares they give
    the p-value of McNemar's exact test (of values 0 and 1 alone they would be Clopper and Pearson's
    bounds). That they hold for every distribution is a conjecture that no one has refuted. Nothing
    is adjusted for several measures: see `holm`.

    Args:
      first: one number per image [n], n >= 1. Infinite ones are the farthest there are.
      second: of the other encoder, on the same images in the same order.
      statistic: as of the metric (`metrics.Metric`); a proportion's values are 0 or 1.
      bounds: least and largest value possible, of a mean.
      confidence: coverage of the interval, in (0, 1).
      seed: of the draws that the interval of a mean takes.

    Returns:
      The comparison.

    Raises:
      UserError: for no values, NaN, different numbers of them, or values out of bounds.

    Reference: Gaffke, "Three test statistics for a nonparametric one-sided hypothesis on the mean
      of a nonnegative variable" (2005); Learned-Miller and Thomas (2019), section 3; McNemar
      (1947).
    """
    x, y = (np.asarray(values, np.float64).ravel() for values in (first, second))
    if x.shape != y.shape or not x.size:
        raise UserError(
            f"Expected as many values of both encoders, and at least one, got {x.size} and "
            f"{y.size}: they are compared on the same images."
        )
    if np.isnan(x).any() or np.isnan(y).any():
        raise UserError("Expected numbers, got NaN: leave those images out of both, and say so.")
    difference = np.subtract(x, y, where=x != y, out=np.zeros_like(x))  # inf - inf is equal
    higher, lower = int((difference > 0).sum()), int((difference < 0).sum())
    counts = higher, lower, int(x.size) - higher - lower
    if statistic == "median":
        p_value = 1.0
        if higher + lower:
            p_value = float(stats.binomtest(higher, higher + lower).pvalue)
        return Paired(median_interval(difference, confidence=confidence), p_value, *counts)
    low, high = bounds
    if min(x.min(), y.min()) < low or max(x.max(), y.max()) > high:
        raise UserError(f"Expected values inside bounds {bounds}, got others.")
    span, rng = high - low, np.random.default_rng(seed)
    sums = [_gaffke(sign * difference, span, rng) for sign in (1.0, -1.0)]
    tail = 0.5 * (1.0 - confidence)
    ends = [float(np.quantile(each, tail, method="inverted_cdf")) for each in sums]
    mean = float(difference.mean())
    estimate = Estimate(mean, min(ends[0], mean), max(-ends[1], mean), int(x.size))
    if statistic == "proportion":
        return Paired(estimate, _mcnemar(higher, lower), *counts)
    below = [float(np.mean(each <= 0.0)) for each in sums]
    return Paired(estimate, max(min(1.0, 2.0 * min(below)), 1.0 / _NUM_DRAWS), *counts)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for all of them being looked at, in their order.

    Whatever they have to do with each other: where no comparison has a difference, one of them is
    below a level with at most that probability.

    Reference: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, last = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        last = max(last, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = last
    return adjusted


def _gaffke(values: np.ndarray, span: float, rng: np.random.Generator) -> np.ndarray:
    """Draws whose alpha-quantile is a lower bound on the mean of values that are >= -span: means
    under weights that are uniform on the simplex, with one more value of -span."""
    distinct, counts = np.unique(np.append(values, -span), return_counts=True)
    # The weights of equal values together: a gamma variable for each.
    weights = rng.standard_gamma(counts, (_NUM_DRAWS, len(counts)))
    return weights @ distinct / weights.sum(1)


def _mcnemar(higher: int, lower: int) -> float:
    """Of the exact test that both have a property equally often."""
    return float(stats.binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0
