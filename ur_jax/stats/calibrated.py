"""Confidence sequences that spend all of their alpha, by exact dynamic programming.

The union bound adds up the alphas of its looks, though whoever fails at one look often fails at the
next as well. For one level p the probability that the count of successes ever crosses a boundary at
the scheduled looks is the sum over all paths: known exactly, from look to look. So the alphas of
the looks are raised by a common factor until that probability is alpha.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import signal, stats

from ur_jax.errors import UserError
from ur_jax.stats.bounds import Counts, UnionBound, accepting_count, check_probability

_STEPS = 24  # of the bisection of the factor
_TAIL = 1e-18  # what is left out of a binomial distribution, and counted as a failure


@dataclass(frozen=True)
class Calibrated(UnionBound):
    """Confidence sequence of a probability at a few levels that are known in advance.

    Looks at the schedule of `UnionBound`, with the same shares of alpha, times the largest common
    factor with which P(count reaches the boundary of p at any look) <= alpha under probability p.

    **Guarantee.** P(some n has count >= accepting(n, p)) <= alpha for each level p that is at least
    the true probability, over the samples (a smaller probability reaches a boundary less often).
    Of the `levels` together: their boundaries rise with p, so that whoever reaches that of a false
    level has reached the boundary of the smallest false one. Computed in float64 from binomial
    probabilities; an error of 1e-12 is allowed for.

    Attributes:
      alpha, n_max, step, ratio: of `UnionBound`.
      levels: levels to compare with, in (0,1).
    """

    levels: tuple[float, ...] = ()

    def accepting(self, n: Counts, p: float) -> np.ndarray:
        """Returns the smallest count after n samples that shows p; n + 1 if none."""
        check_probability("p", p)
        below = [level for level in self.levels if level < p]
        boundaries = [_boundary(self.alpha, self._places, level) for level in [*below, p]]
        boundary = np.max(boundaries, axis=0)
        n = np.asarray(n, np.int64)
        at = np.searchsorted(self.schedule, n)
        scheduled = np.isin(n, self.schedule)
        return np.where(scheduled, boundary[np.minimum(at, len(boundary) - 1)], n + 1)

    def lower(self, successes: Counts, n: Counts) -> np.ndarray:
        """Returns the largest of the levels that the count shows, 0 if none."""
        if not self.levels:
            raise UserError("Expected levels to bound a probability from below by, got none.")
        k, n = np.broadcast_arrays(np.asarray(successes), np.asarray(n))
        found = np.zeros(k.shape)
        for level in sorted(self.levels):
            found = np.where(k >= self.accepting(n, level), level, found)
        return found

    @property
    def _places(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.schedule)


def crossing_probability(looks: tuple[int, ...], boundary: np.ndarray, p: float) -> float:
    """P(count >= boundary at some look), of counts of successes of probability p.

    Args:
      looks: numbers of samples, rising.
      boundary: counts, one for each look.
      p: probability of success.
    """
    alive, first = np.ones(1), 0  # P(count = first + i, nothing crossed so far)
    crossed, before = 0.0, 0
    for n, bound in zip(looks, boundary):
        new = n - before
        low, high = stats.binom.ppf(_TAIL, new, p), stats.binom.isf(_TAIL, new, p)
        low, high = max(int(low) - 1, 0), min(int(high) + 1, new)
        added = stats.binom.pmf(np.arange(low, high + 1), new, p)
        alive = np.maximum(signal.fftconvolve(alive, added), 0.0) if alive.size else alive
        first, before = first + low, n
        keep = int(np.clip(bound - first, 0, alive.size))
        crossed += float(alive[keep:].sum()) + 2 * _TAIL
        alive = alive[:keep]
        heavy = np.flatnonzero(np.cumsum(alive) > _TAIL)  # what is far below never comes back
        if heavy.size:
            first, alive = first + int(heavy[0]), alive[heavy[0] :]
    return crossed


@functools.lru_cache(maxsize=4096)
def _boundary(alpha: float, looks: tuple[int, ...], p: float) -> np.ndarray:
    """The calibrated boundary of one level: a count for each look, n + 1 where none accepts."""
    n = np.array(looks)
    shares = np.full(len(n), 0.5 / max(len(n) - 1, 1))
    shares[-1] = 0.5 if len(n) > 1 else 1.0
    allowed = alpha - 1e-12

    def at(factor: float) -> np.ndarray:
        return accepting_count(n, p, np.minimum(alpha * shares * factor, 0.999))

    low, high = 1.0, 2.0 * len(n)
    if crossing_probability(looks, at(low), p) > allowed:
        return at(0.999)  # of rounding
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        fits = crossing_probability(looks, at(middle), p) <= allowed
        low, high = (middle, high) if fits else (low, middle)
    return at(low)
