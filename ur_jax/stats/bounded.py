"""Bounds of means of bounded values, from a few numbers that are kept of them; float64 on the host.

Where all values are at hand, or a histogram of them, `betting` is tighter.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from ur_jax.checks import check_number
from ur_jax.stats.bounds import check_counts, check_probability

_BISECTIONS = 60


def kl_upper(mean: np.ndarray | float, n: int, alpha: float) -> np.ndarray:
    """Upper bound of the mean of values in [0,1]: the largest p with n kl(mean, p) <= ln(1/alpha).

    **Guarantee.** P(bound < E x) <= alpha over n independent values in [0,1] (Hoeffding 1963,
    theorem 1: none has a heavier lower tail than Bernoulli ones of the same mean).

    Args:
      mean: of the n values, in [0,1].
      n: how many, fixed in advance.
      alpha: failure probability, in (0,1).
    """
    check_number(SimpleNamespace(alpha=alpha), "alpha", above=0.0, below=1.0)
    check_counts(n)
    check_probability("mean", mean, inside=False)
    mean, most = np.asarray(mean, np.float64), math.log(1 / alpha) / n
    low, high = mean, np.ones_like(mean)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        inside = _kl(mean, middle) <= most
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return high


def kl_lower(mean: np.ndarray | float, n: int, alpha: float) -> np.ndarray:
    """Lower bound of the mean of values in [0,1]: 1 - the upper one of 1 - values."""
    return 1.0 - kl_upper(1.0 - np.asarray(mean, np.float64), n, alpha)


def least_sample_mean(mean: np.ndarray | float, n: int, alpha: float) -> np.ndarray:
    """What the mean of n values of a mean in [0,1] is below with probability at most alpha.

    The smallest q with n kl(q, mean) <= ln(1 / alpha), by the same inequality.
    """
    mean, most = np.asarray(mean, np.float64), math.log(1 / alpha) / n
    low, high = np.zeros_like(mean), mean
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        inside = _kl(middle, mean) <= most
        low, high = np.where(inside, low, middle), np.where(inside, middle, high)
    return low


def bernstein_lower(mean: np.ndarray, variance: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """Lower bound of the mean of values in [-1,1], from their mean and sample variance.

        mean - sqrt(2 V ln(2 / alpha) / n) - 14 ln(2 / alpha) / (3 (n - 1))

    **Guarantee.** P(bound > E x) <= alpha over n >= 2 independent values.

    Args:
      mean: of the n values.
      variance: V, their sample variance, divided by n - 1.
      n: how many, fixed in advance.
      alpha: failure probability, in (0,1).

    Reference: A. Maurer, M. Pontil, "Empirical Bernstein bounds" (2009), theorem 4.
    """
    log = math.log(2 / alpha)
    return mean - np.sqrt(2 * variance * log / n) - 14 * log / (3 * (n - 1))


def deviation_of_vectors(norm: float, second_moment: float, n: int, alpha: float) -> float:
    """How far the mean of n independent vectors is from its expectation, but for alpha.

        M L / (3 n) + sqrt((M L / (3 n))^2 + 2 V L / n),    L = ln(2 / alpha)

    Args:
      norm: M, of a vector less its expectation, at most.
      second_moment: V, at least the expected square of that norm.
      n: how many.
      alpha: failure probability, in (0,1).

    Reference: I. Pinelis, "Optimum bounds for the distributions of martingales in Banach spaces"
    (1994), theorem 3.4, in the form of Bernstein's inequality; no dimension enters.
    """
    log = math.log(2 / alpha)
    linear = norm * log / (3 * n)
    return linear + math.sqrt(linear**2 + 2 * second_moment * log / n)


def _kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Relative entropy of Bernoulli a to Bernoulli b."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(a > 0, a * np.log(a / b), 0.0)
        second = np.where(a < 1, (1 - a) * np.log((1 - a) / (1 - b)), 0.0)
    return first + second
