"""Stopping rules of the adaptive certificates, as integer tables that the device looks up.

After n samples with k successes the device compares k with two integers of row n. All statistics
are done once per configuration, on the host, in float64.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from scipy import stats

from ur_jax.checks import check_number, check_whole
from ur_jax.errors import unknown_name
from ur_jax.stats.bounds import (
    Betting,
    ConfidenceSequence,
    UnionBound,
    check_counts,
    check_probability,
    rejecting,
    upper,
)
from ur_jax.stats.calibrated import Calibrated

SEQUENCES = ("betting", "union", "calibrated")

_GRID = 48


def confidence_sequence(
    bound: str, *, alpha: float, n_max: int, step: int, levels: tuple[float, ...] = ()
) -> ConfidenceSequence:
    """Returns the confidence sequence of a name of `SEQUENCES`, for at most `n_max` samples.

    Args:
      bound: "union", "betting" or "calibrated".
      alpha: failure probability of one side.
      n_max: the cap on the number of samples.
      step: samples between two looks.
      levels: of "calibrated", what is compared with; see `Calibrated`.
    """
    if not isinstance(bound, str) or bound not in SEQUENCES:
        name = bound if isinstance(bound, str) else repr(bound)
        raise unknown_name("confidence sequence", name, SEQUENCES)
    if bound == "betting":
        return Betting(alpha, n_max)
    if bound == "union":
        return UnionBound(alpha, n_max, step)
    return Calibrated(alpha, n_max, step, levels=levels)


class Table(NamedTuple):
    """Integer thresholds on the number of successes, one row per number of samples.

    Attributes:
      accept: [T, J] int32; a count of at least this settles question j with yes.
      reject: [T, J] int32; a count of at most this settles question j with no.
    """

    accept: np.ndarray
    reject: np.ndarray


def looking_times(n_max: int, step: int) -> np.ndarray:
    """Returns the numbers of samples after which a decision is looked up, [T] int64.

    Args:
      n_max: the last one, >= 1.
      step: all others are multiples of it.
    """
    check_whole(SimpleNamespace(n_max=n_max, step=step), "n_max", "step")
    check_counts(n_max)
    return np.append(np.arange(step, n_max, step), n_max)


def level_table(sequence: ConfidenceSequence, times: np.ndarray, levels: np.ndarray) -> Table:
    """Thresholds for "is the probability at least this level?", for every level.

    A question is also settled with no once no outcome of the samples that are left could accept
    it; that costs no failure probability.

    Args:
      sequence: the confidence sequence; its alpha bounds the probability that any question is
        wrongly accepted, over all levels and times together, and likewise wrongly rejected by it.
      times: numbers of samples, [T], as of `looking_times`.
      levels: probabilities to compare with, [J], in (0,1).

    Returns:
      The table.
    """
    for p in levels:
        check_probability("levels", p)
    accept = np.stack([sequence.accepting(times, p) for p in levels], axis=1)
    reject = np.stack([rejecting(sequence, times, p) for p in levels], axis=1)
    # Best case from n on: successes only. Out of reach if k + (m - n) < accept[m] for all m >= n.
    slack = np.minimum.accumulate((accept - times[:, None])[::-1], axis=0)[::-1]
    hopeless = slack + times[:, None] - 1
    # Only where the sequence has a bound to report the radius by.
    has_bound = (accept <= times[:, None]).any(axis=1, keepdims=True)
    reject = np.where(has_bound, np.maximum(reject, hopeless), reject)
    return Table(accept.astype(np.int32), reject.astype(np.int32))


def tolerance_table(
    sequence: ConfidenceSequence, times: np.ndarray, *, sigma: float, tolerance: float
) -> Table:
    """Thresholds for "is the certified radius within the tolerance of what is still in reach?".

    After n samples with k successes the radius is sigma Phi^-1(lower(k, n)). Still in reach is the
    smaller of sigma Phi^-1(upper(k, n)), which the truth exceeds with probability at most alpha,
    and the radius after all n_max samples were every further one a success, which is certain.
    Accepted are counts so high, rejected are counts so low, that the two differ by at most the
    tolerance. Where to stop costs no soundness: the lower ends hold at all n together.

    Args:
      sequence: the confidence sequence.
      times: numbers of samples, [T], ending at the cap.
      sigma: standard deviation of the noise, in pixel units, > 0.
      tolerance: width to stop at, in pixel units, > 0.

    Returns:
      The table, with J = 1. The last row settles every count.
    """
    check_number(SimpleNamespace(sigma=sigma, tolerance=tolerance), "sigma", "tolerance", above=0.0)
    n_max = times[-1]

    def settled(failures, n):
        k = n - failures
        radius = stats.norm.ppf(np.maximum(sequence.lower(k, n), 0.5))
        hoped = stats.norm.ppf(np.maximum(upper(sequence, k, n), 0.5))
        best = stats.norm.ppf(np.maximum(sequence.lower(n_max - failures, n_max), 0.5))
        return sigma * (np.minimum(hoped, best) - radius) <= tolerance

    # The width rises and then falls with the number of failures: two ends of a range settle.
    fractions = np.concatenate([[0.0], np.geomspace(1e-5, 1.0, _GRID)])
    failures = np.unique(np.round(times[:, None] * fractions).astype(np.int64), axis=1)
    grid = settled(failures, times[:, None])
    few = _edge(lambda m: settled(m, times), failures, grid)
    mirrored = lambda m: settled(times - m, times)
    many = _edge(mirrored, times[:, None] - failures[:, ::-1], grid[:, ::-1])
    accept, reject = times - few, many
    accept[-1] = 0
    return Table(accept[:, None].astype(np.int32), reject[:, None].astype(np.int32))


def _edge(settled, grid, values):
    """Largest m up to which `settled` holds from the grid's start on, -1 if nowhere; per row."""
    row = np.arange(len(grid))
    first_false = np.where(values.all(axis=1), grid.shape[1], values.argmin(axis=1))
    low = np.where(first_false > 0, grid[row, np.maximum(first_false - 1, 0)], -1)
    high = grid[row, np.minimum(first_false, grid.shape[1] - 1)] + (first_false == grid.shape[1])
    while np.any(high - low > 1):
        middle = (low + high) // 2
        holds = settled(np.maximum(middle, 0))
        open_ = high - low > 1
        low = np.where(open_ & holds, middle, low)
        high = np.where(open_ & ~holds, middle, high)
    return low
