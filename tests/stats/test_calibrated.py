"""Calibrated sequences: the exact probability of crossing, by all paths and by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from ur_jax.errors import UserError
from ur_jax.stats.bounds import UnionBound, clopper_pearson_lower, randomized_lower
from ur_jax.stats.calibrated import Calibrated, crossing_probability
from ur_jax.stats.sequences import confidence_sequence


def test_crossing_is_the_sum_over_all_paths():
    looks, boundary, p = (2, 5, 9), np.array([2, 5, 7]), 0.6
    total = 0.0
    for path in itertools.product([0, 1], repeat=9):
        counts = np.cumsum(path)
        if any(counts[n - 1] >= bound for n, bound in zip(looks, boundary)):
            total += p ** sum(path) * (1 - p) ** (9 - sum(path))
    assert crossing_probability(looks, boundary, p) == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("p", [0.5, 0.953, 0.995])
def test_it_spends_its_alpha_and_accepts_earlier_than_the_union_bound(p):
    """False alarm 1e-4: 10,000 walks at the level itself; a level above is crossed less often."""
    sequence, union = Calibrated(0.01, 5000, 100), UnionBound(0.01, 5000, 100)
    looks = tuple(int(n) for n in sequence.schedule)
    boundary = sequence.accepting(np.array(looks), p)
    assert np.all(boundary <= union.accepting(np.array(looks), p))
    spent = crossing_probability(looks, boundary, p)
    assert 0.7 * 0.01 < spent <= 0.01
    rng = np.random.default_rng(0)
    counts = np.cumsum(rng.binomial(np.diff((0, *looks)), p, (10_000, len(looks))), axis=1)
    assert (counts >= boundary).any(axis=1).sum() <= stats.binom.ppf(1 - 1e-4, 10_000, 0.01)
    assert crossing_probability(looks, boundary, p - 0.003) < spent


def test_the_levels_of_one_sequence_hold_together():
    """Boundaries rise with the level, so that a false answer is one of the smallest false level."""
    levels = (0.52, 0.6, 0.61, 0.8)
    sequence = confidence_sequence("calibrated", alpha=0.01, n_max=2000, step=100, levels=levels)
    n = sequence.schedule
    boundaries = np.array([sequence.accepting(n, p) for p in levels])
    assert np.all(np.diff(boundaries, axis=0) >= 0)
    assert np.all(sequence.accepting(n[:-1] + 1, 0.6) == n[:-1] + 2)  # where it does not look
    assert sequence.lower(boundaries[2, -1], 2000) in (0.61, 0.8)
    assert sequence.lower(0, 2000) == 0.0
    with pytest.raises(UserError, match="levels"):
        Calibrated(0.01, 2000, 100).lower(5, 2000)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.97])
def test_the_randomised_bound_fails_with_alpha_itself(p):
    """The failure probability is a sum over counts and an integral over u, on a fine grid."""
    n, alpha, u = 30, 0.05, (np.arange(2000) + 0.5) / 2000
    k = np.arange(n + 1)[:, None]
    bound = randomized_lower(k, n, alpha, u)
    failed = (stats.binom.pmf(k, n, p) * (bound > p)).sum() / len(u)
    assert failed == pytest.approx(alpha, abs=1e-3)
    plain = clopper_pearson_lower(k[:, 0], n, alpha)
    assert np.all(bound >= plain[:, None] - 1e-12)
    np.testing.assert_allclose(randomized_lower(k[:, 0], n, alpha, 1.0), plain, atol=1e-12)
