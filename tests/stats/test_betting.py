"""Betting bounds of a mean: the gambler's wealth in plain loops, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ur_jax.errors import UserError
from ur_jax.stats import betting
from ur_jax.stats.betting import mean_lower, mean_upper


def wealth(values, mean):
    """What is left of 1, bet by bet."""
    total = 0.0
    for share, weight in zip(betting._SHARES, betting._PRIOR):
        money = weight
        for value in values:
            money *= 1 + share * (value / mean - 1)
        total += money
    return total


def test_the_bound_is_where_the_wealth_reaches_one_over_alpha():
    values = np.random.default_rng(0).beta(5, 2, 30)
    low = mean_lower(values, 0.05)
    assert wealth(values, low) == pytest.approx(20, rel=1e-6)
    assert wealth(values, 0.9 * low) > 20 > wealth(values, 1.1 * low)
    assert mean_upper(values, 0.05) == pytest.approx(1 - mean_lower(1 - values, 0.05))
    assert mean_lower(values[:5], 0.05, [3, 0, 1, 2, 1]) == pytest.approx(
        mean_lower(values[[0, 0, 0, 2, 3, 3, 4]], 0.05)
    )
    assert mean_lower(np.floor(64 * values) / 64, 0.05) <= low  # lowered values lower it
    assert betting._PRIOR.sum() == pytest.approx(1)


@pytest.mark.parametrize("probability", [0.02, 0.5, 0.9])
def test_it_holds_at_all_numbers_of_values_together(probability):
    """False alarm 1e-4: the wealth of 1,000 gamblers against the truth, ever at 1 / alpha."""
    alpha, rng = 0.05, np.random.default_rng(1)
    values = (rng.random((1000, 300)) < probability).astype(float)
    factors = 1 + betting._SHARES[:, None, None] * (values / probability - 1)
    ever = (betting._PRIOR[:, None, None] * np.cumprod(factors, axis=2)).sum(0).max(1)
    assert (ever >= 1 / alpha).sum() <= stats.binom.ppf(1 - 1e-4, 1000, alpha)


@pytest.mark.parametrize("values", [[], [0.5, np.nan], [1.5], [-0.1]])
def test_other_values_are_refused(values):
    with pytest.raises(UserError, match=r"in \[0,1\]"):
        mean_lower(values, 0.05)
