"""Numbers with confidence intervals, on the host in float64.

Every interval is over the independent units, the images: one value per image (or per pair of
images that share none), however many comparisons the value itself sums up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ur_jax.checks import whole_number
from ur_jax.errors import UserError
from ur_jax.stats.betting import mean_lower, mean_upper


class Estimate(NamedTuple):
    """A reported number: its value, the ends of its confidence interval, and how many images."""

    value: float
    low: float
    high: float
    n: int


def median_interval(values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Median with the exact order-statistic interval.

        P(X_(r) <= median <= X_(n+1-r)) >= 1 - 2 P(Binomial(n, 1/2) < r),   X_(r) r-th smallest

    with the largest r that keeps the right side at `confidence`. Holds for any distribution and
    is conservative, the more so for small n. Where even the range of the data covers less than
    `confidence` (n < 6 at 95 %), no such interval is finite and the ends are -inf and inf.
    A monotone transformation by fixed numbers carries over: the interval of d / median F, or of
    F(d), is that of d transformed, with F taken as given.

    Args:
      values: one number per image [n], n >= 1; infinite ones have their place at the ends.
      confidence: coverage wanted, in (0, 1).

    Returns:
      The median with its interval.

    Raises:
      UserError: for NaN or no values, or a confidence outside (0, 1).

    Reference: H. A. David, H. N. Nagaraja, Order Statistics, 3rd ed. (2003), section 7.1.
    """
    values = np.sort(_numbers(values))
    _tail(confidence)
    n = values.size
    low_middle, high_middle = values[(n - 1) // 2], values[n // 2]
    # Two equal ones may be infinite, and have no mean of their own.
    median = low_middle if low_middle == high_middle else np.mean([low_middle, high_middle])
    low, high = stats.quantile_test(values, p=0.5).confidence_interval(confidence)
    # NaN where no order statistic covers.
    low, high = -np.inf if np.isnan(low) else low, np.inf if np.isnan(high) else high
    return Estimate(float(median), float(low), float(high), n)


def proportion_interval(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """Proportion with the exact (Clopper-Pearson) binomial interval.

    Covers the probability of success with at least `confidence`, whatever it is.

    Args:
      successes: how many images have the property, 0 <= successes <= n.
      n: how many images, >= 1.
      confidence: coverage wanted, in (0, 1).

    Returns:
      successes / n with its interval.

    Raises:
      ValueError: for counts out of range, or a confidence outside (0, 1).

    Reference: C. Clopper, E. Pearson, Biometrika 26 (1934).
    """
    successes, n = whole_number(successes, "successes"), whole_number(n, "n")
    if not 0 <= successes <= n or n < 1:
        raise UserError(f"Expected 0 <= successes <= n and n >= 1, got {successes} and {n}.")
    _tail(confidence)
    ends = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method="exact")
    return Estimate(successes / n, float(ends.low), float(ends.high), int(n))


def proportion_bounds(successes: ArrayLike, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends of `proportion_interval` at 95 %, for many counts of the same n images at once.

    Args:
      successes: counts (K,), 0 <= successes <= n.
      n: how many images, >= 1.

    Returns:
      low and high ends (K,), float64; each pair holds for its count alone, not all of them at once.
    """
    counts = np.asarray(successes, np.float64)
    with np.errstate(invalid="ignore"):  # a count of 0 or n has no quantile, and needs none
        low = stats.beta.ppf(0.025, counts, n - counts + 1)
        high = stats.beta.ppf(0.975, counts + 1, n - counts)
    return np.where(counts == 0, 0.0, low), np.where(counts == n, 1.0, high)


def mean_interval(
    values: ArrayLike,
    *,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Mean of one number per image, with an interval by betting against every other mean.

    For fractions such as breakaway risk, where an image's own value sums up a million dependent
    comparisons: the images are the independent units. Covers the mean with at least `confidence`
    for every number of images and every distribution inside the bounds, also where a few images
    carry the mean and n of them may hold none; it is wider than a bootstrap's interval, which does
    not (where 3 % of the images carry it, of n = 64, 16 and 5 images at least 0.14, 0.61 and 0.86
    of all samples hold none, and an interval of what was seen misses).

    Args:
      values: one number per image [n], n >= 1, finite and inside `bounds`.
      confidence: coverage wanted, in (0, 1).
      bounds: least and largest value possible.

    Returns:
      The mean with its interval.

    Raises:
      ValueError: for NaN, infinite, no or out-of-bounds values, or a confidence outside (0, 1).

    Reference: `stats.betting`, each end at half of what is left.
    """
    values = _finite(values)
    lower, upper = bounds
    if values.min() < lower or values.max() > upper:
        raise UserError(
            f"Expected values inside bounds {bounds}, got {values.min()} to {values.max()}; "
            f"pass the bounds that hold."
        )
    mean, tail = float(values.mean()), _tail(confidence)
    if upper <= lower:  # one value is possible, and known
        return Estimate(mean, mean, mean, values.size)
    unit = np.clip((values - lower) / (upper - lower), 0.0, 1.0)
    low = lower + (upper - lower) * mean_lower(unit, tail)
    high = lower + (upper - lower) * mean_upper(unit, tail)
    return Estimate(mean, min(low, mean), max(high, mean), values.size)


def _finite(values: ArrayLike) -> np.ndarray:
    """The values as float64 [n], refused if there are none or some are not finite."""
    return _numbers(values, infinite=False)


def _numbers(values: ArrayLike, infinite: bool = True) -> np.ndarray:
    """The values as float64 [n], refused if there are none, or some are NaN, or infinite."""
    values = np.asarray(values, np.float64).ravel()
    if values.size == 0:
        raise UserError("Expected at least one value, got none.")
    bad = int(np.count_nonzero(np.isnan(values) if infinite else ~np.isfinite(values)))
    if bad:
        what = "numbers, got" if infinite else "finite values, got"
        kind = "NaN" if infinite else "NaN or infinite"
        raise UserError(
            f"Expected {what} {bad} {kind} of {values.size}; leave those "
            f"images out and say so, or find what made them (representations, zero distances)."
        )
    return values


def _tail(confidence: float) -> float:
    """Probability left on either side of an interval."""
    if not 0.0 < confidence < 1.0:
        raise UserError(f"Expected confidence in (0, 1), got {confidence}; 0.95 is usual.")
    return 0.5 * (1.0 - confidence)
