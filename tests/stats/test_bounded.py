"""Bounds of means: of Bernoulli values, whose failures are a finite sum, and of vectors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ur_jax.stats.betting import mean_lower
from ur_jax.stats.bounded import (
    bernstein_lower,
    deviation_of_vectors,
    kl_lower,
    kl_upper,
    least_sample_mean,
)

N, ALPHA = 60, 0.05


@pytest.mark.parametrize("p", [0.001, 0.03, 0.5, 0.9, 0.999])
def test_none_fails_more_often_than_it_says_at_two_values(p):
    k = np.arange(N + 1)
    mass, mean = stats.binom.pmf(k, N, p), k / N
    assert mass[kl_upper(mean, N, ALPHA) < p].sum() <= ALPHA
    assert mass[kl_lower(mean, N, ALPHA) > p].sum() <= ALPHA
    assert mass[mean < least_sample_mean(p, N, ALPHA)].sum() <= ALPHA
    bets = np.array([mean_lower([0.0, 1.0], ALPHA, [N - i, i]) for i in k])
    assert mass[bets > p].sum() <= ALPHA
    # Values -1 and 1, of mean 2 p - 1.
    variance = 4 * mean * (1 - mean) * N / (N - 1)
    assert mass[bernstein_lower(2 * mean - 1, variance, N, ALPHA) > 2 * p - 1].sum() <= ALPHA


def test_closed_forms():
    assert kl_upper(0.0, 100, 0.01) == pytest.approx(1 - 0.01**0.01)
    assert kl_lower(0.3, 100, 0.01) < 0.3 < kl_upper(0.3, 100, 0.01)
    q = float(least_sample_mean(0.4, 100, 0.01))
    kl = q * np.log(q / 0.4) + (1 - q) * np.log((1 - q) / 0.6)
    assert q < 0.4 and kl * 100 == pytest.approx(np.log(100))


@pytest.mark.parametrize("rare", [0.02, 0.5])
def test_means_of_vectors_stay_within_their_deviation(rare):
    """False alarm 1e-4: 10,000 means of vectors that are long with a small probability."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((10_000, 40, 3))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    vectors = directions * (rng.random((10_000, 40, 1)) < rare)
    bound = deviation_of_vectors(1.0, rare, 40, ALPHA)
    outside = np.linalg.norm(vectors.mean(axis=1), axis=1) > bound
    assert outside.sum() <= stats.binom.ppf(1 - 1e-4, 10_000, ALPHA)
