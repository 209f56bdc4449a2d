"""The bounds: exact values, and their promises by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ur_jax.errors import UserError
from ur_jax.stats import bounds, sequences
from ur_jax.stats.sequences import level_table, looking_times, tolerance_table

NUM_SIMULATED = 10_000


def most_failures(alpha):
    """Failures that 10,000 certificates of failure rate alpha exceed with probability 3e-5."""
    return stats.binom.isf(stats.norm.sf(4), NUM_SIMULATED, alpha)


def counts_at(rng, times, p, size=NUM_SIMULATED):
    """Cumulative successes at each of the times, [size, T]."""
    return rng.binomial(np.diff(times, prepend=0), p, (size, len(times))).cumsum(axis=1)


def test_clopper_pearson_inverts_the_binomial_tail():
    lower = bounds.clopper_pearson_lower(np.array([0, 1, 70, 100]), 100, 0.01)
    assert lower[0] == 0.0
    tails = stats.binom.sf(np.array([0, 69, 99]), 100, lower[1:])
    np.testing.assert_allclose(tails, 0.01, rtol=1e-9)
    np.testing.assert_allclose(lower[3], 0.01 ** (1 / 100), rtol=1e-12)
    upper = bounds.clopper_pearson_upper(np.array([0, 30, 100]), 100, 0.01)
    np.testing.assert_allclose(upper, 1 - lower[[3, 2, 0]], rtol=1e-12)


@pytest.mark.parametrize("n", [1, 7, 128, 1000])
def test_threshold_counts_agree_with_a_plain_search(n):
    for p in (0.1, 0.5, 0.9, 0.999):
        for alpha in (0.3, 0.001):
            k = np.arange(n + 1)
            accepting = next((i for i in k if stats.binom.sf(i - 1, n, p) <= alpha), n + 1)
            rejecting = next((i for i in k[::-1] if stats.binom.cdf(i, n, p) <= alpha), -1)
            assert bounds.accepting_count(n, p, alpha) == accepting
            assert bounds.rejecting_count(n, p, alpha) == rejecting


def test_hoeffding_levels_are_the_reference_ones(golden):
    stored = golden("center_smoothing.npz")
    p = stats.norm.cdf(stats.norm.ppf(0.55) + 1.0)
    levels = [bounds.hoeffding_level(int(n), p, 0.005) for n in stored["quantile_n_cert"]]
    np.testing.assert_allclose(levels, stored["quantile"], atol=1e-9, rtol=0)


def test_exact_rank_is_below_the_hoeffding_level_and_never_past_the_samples():
    p = 0.87
    for n in (200, 20_000, 100_000):
        assert p * n < bounds.order_statistic_rank(n, p, 0.005) <= n
    for n in (20_000, 100_000):
        level = bounds.hoeffding_level(n, p, 0.005)
        assert bounds.order_statistic_rank(n, p, 0.005) <= math.floor(level * (n - 1)) + 1


def test_impossible_sample_sizes_are_refused_with_the_one_that_would_do():
    with pytest.raises(ValueError, match="n >= 39"):
        bounds.order_statistic_rank(38, 0.87, 0.005)
    assert bounds.order_statistic_rank(39, 0.87, 0.005) == 39
    with pytest.raises(ValueError, match="n >= 157"):
        bounds.hoeffding_level(156, 0.87, 0.005)
    bounds.hoeffding_level(157, 0.87, 0.005)
    with pytest.raises(ValueError, match="betting"):
        sequences.confidence_sequence("beting", alpha=0.1, n_max=100, step=10)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (bounds.clopper_pearson_lower, (-1, 10, 0.1), "0 <= successes <= n"),
        (bounds.clopper_pearson_lower, (11, 10, 0.1), "0 <= successes <= n"),
        (bounds.clopper_pearson_lower, (1.5, 10, 0.1), "successes of whole numbers.*got 1.5"),
        (bounds.clopper_pearson_lower, (np.array([1, math.nan]), 10, 0.1), "whole numbers"),
        (bounds.clopper_pearson_upper, (0, 0, 0.1), "n of whole numbers >= 1.* got 0"),
        (bounds.clopper_pearson_upper, (1, "10", 0.1), "n of whole numbers"),
        (bounds.accepting_count, (10, 1.5, 0.1), r"p in \[0,1\]"),
        (bounds.accepting_count, (10, math.nan, 0.1), r"p in \[0,1\]"),
        (bounds.rejecting_count, (10.5, 0.5, 0.1), "n of whole numbers"),
        (bounds.order_statistic_rank, (10, 1.0, 0.1), "p > 0 and < 1"),
        (bounds.hoeffding_level, (0, 0.5, 0.1), "n >= 1, got 0"),
        (bounds.hoeffding_level, (1000, -0.5, 0.1), "p > 0 and < 1"),
        *(
            (function, (*counts, alpha), "alpha (strictly between 0 and 1|> 0 and < 1)")
            for alpha in (0.0, 1.0, -1.0, math.nan, None, 1j)
            for function, counts in (
                (bounds.clopper_pearson_lower, (1, 10)),
                (bounds.accepting_count, (10, 0.5)),
                (bounds.order_statistic_rank, (10, 0.5)),
                (bounds.hoeffding_level, (1000, 0.5)),
            )
        ),
        (bounds.Betting, (1.5, 10), "alpha > 0 and < 1"),
        (bounds.Betting, (0.1, 0), "n_max >= 1"),
        (bounds.UnionBound, (0.1, 10, 2.5), "step >= 1"),
        (bounds.UnionBound, (0.1, 10, 2, 1.0), "ratio > 1"),
        (bounds.accepting_count, (1e308, 0.5, 0.1), "below 2.31"),
        (looking_times, (0, 128), "n_max >= 1"),
        (looking_times, (10**30, 128), "below 2.31"),
        (looking_times, (100, 0), "step >= 1"),
    ],
)
def test_values_out_of_range_are_one_line(function, arguments, message):
    with pytest.raises(UserError, match=message):
        function(*arguments)


def test_the_interpolated_quantile_is_a_bound_wherever_it_is_accepted():
    """With 4 samples at alpha 0.5 it lay below the quantile in two of three cases."""
    rng, n, alpha = np.random.default_rng(8), 4, 0.5
    p = float(stats.norm.cdf(stats.norm.ppf(0.55) + 0.2))
    with pytest.raises(UserError, match="interpolated quantile .* got 4"):
        bounds.check_interpolated(n, p, alpha)
    refused = 0
    for alpha in (0.5, 0.3, 0.1, 0.005):
        for n in (*range(1, 60), 200):
            try:
                bounds.check_interpolated(n, p, alpha)
            except UserError:
                refused += 1
                continue
            samples = np.sort(rng.random((NUM_SIMULATED, n)), axis=1)
            rank = bounds.interpolated_rank(n, bounds.hoeffding_level(n, p, alpha))
            below = min(math.floor(rank), n - 1)  # both ends counted from 1
            share = rank - below
            read = (1 - share) * samples[:, below - 1] + share * samples[:, below]
            assert np.sum(read < p) <= most_failures(alpha), (n, alpha)
    assert 4 < refused < 100


def test_betting_wealth_is_the_product_of_the_bets():
    # Krichevsky-Trofimov: the next outcome is predicted by (successes + 1/2) / (trials + 1).
    outcomes = np.random.default_rng(0).random(60) < 0.8
    p, wealth, successes = 0.6, 1.0, 0
    for n, outcome in enumerate(outcomes):
        predicted = (successes + 0.5) / (n + 1)
        wealth *= predicted / p if outcome else (1 - predicted) / (1 - p)
        successes += outcome
    alpha = 2 / wealth  # the alpha at which exactly this wealth excludes p
    n = len(outcomes)
    for factor, accepts in ((1.001, True), (0.999, False)):
        sequence = bounds.Betting(alpha * factor, n_max=10**6)
        assert (successes >= sequence.accepting(n, p)) == accepts
        assert (sequence.lower(successes, n) >= p) == accepts


@pytest.mark.parametrize("bound", ["betting", "union"])
def test_integer_thresholds_are_those_of_the_bounds(bound):
    times = looking_times(3000, 128)
    sequence = sequences.confidence_sequence(bound, alpha=0.01, n_max=3000, step=128)
    for p in (0.5, 0.69, 0.977):
        k = sequence.accepting(times, p)
        possible = k <= times
        assert possible[-1]
        assert np.all(sequence.lower(k, times)[possible] >= p - 1e-12)
        assert np.all(sequence.lower(k - 1, times)[possible] < p)
        rejecting = bounds.rejecting(sequence, times, p)
        some = rejecting >= 0
        assert np.all(bounds.upper(sequence, rejecting, times)[some] <= p + 1e-12)


@pytest.mark.parametrize("p", [0.5, 0.6915, 0.9772, 0.999])
def test_clopper_pearson_promise(p):
    rng = np.random.default_rng(1)
    for alpha, n in ((0.05, 500), (0.001, 20_000)):
        k = rng.binomial(n, p, NUM_SIMULATED)
        assert np.sum(bounds.clopper_pearson_lower(k, n, alpha) > p) <= most_failures(alpha)
        assert np.sum(bounds.clopper_pearson_upper(k, n, alpha) < p) <= most_failures(alpha)


@pytest.mark.parametrize("p", [0.55, 0.87, 0.99])
def test_order_statistic_promise(p):
    # The k-th of n uniform samples is Beta(k, n + 1 - k), and the p-quantile is p.
    rng = np.random.default_rng(2)
    for alpha, n in ((0.05, 600), (0.005, 20_000)):
        k = bounds.order_statistic_rank(n, p, alpha)
        failures = np.sum(rng.beta(k, n + 1 - k, NUM_SIMULATED) < p)
        assert failures <= most_failures(alpha)
        # Tight, not merely sound: it fails as often as the binomial tail says.
        exact = stats.binom.sf(k - 1, n, p)
        assert abs(failures / NUM_SIMULATED - exact) <= 4 * math.sqrt(exact / NUM_SIMULATED)


def test_order_statistic_promise_on_ties():
    # Distances on three values: the quantile sits on an atom.
    rng = np.random.default_rng(3)
    k = bounds.order_statistic_rank(500, 0.87, 0.05)
    distances = np.sort(rng.choice([1, 2, 3], p=[0.6, 0.265, 0.135], size=(2000, 500)), axis=1)
    assert np.sum(distances[:, k - 1] < 3) <= stats.binom.isf(3e-5, 2000, 0.05)


@pytest.mark.parametrize("bound", ["betting", "union"])
@pytest.mark.parametrize("p", [0.5, 0.6915, 0.9772])
def test_sequences_hold_at_all_times(bound, p):
    """The mode that decides radii: the level is exactly the truth, so either answer is hard."""
    alpha, times = 0.01, looking_times(20_000, 128)
    sequence = sequences.confidence_sequence(bound, alpha=alpha, n_max=20_000, step=128)
    k = counts_at(np.random.default_rng(4), times, p)
    assert (k >= sequence.accepting(times, p)).any(axis=1).sum() <= most_failures(alpha)
    assert (k <= bounds.rejecting(sequence, times, p)).any(axis=1).sum() <= most_failures(alpha)
    # The whole rule, with several radii about the truth: any wrongly accepted one counts.
    table = level_table(sequence, times, np.array([p, p + 0.003, p + 0.01]))
    accepted = (k[:, :, None] >= table.accept).any(axis=(1, 2))
    assert accepted.sum() <= most_failures(alpha)


@pytest.mark.parametrize("bound", ["betting", "union"])
@pytest.mark.parametrize("p", [0.51, 0.9, 0.999, 0.99999])
def test_radius_to_a_tolerance(bound, p):
    alpha, sigma, tolerance, times = 0.01, 0.5, 0.1, looking_times(20_000, 128)
    sequence = sequences.confidence_sequence(bound, alpha=alpha, n_max=20_000, step=128)
    table = tolerance_table(sequence, times, sigma=sigma, tolerance=tolerance)
    k = counts_at(np.random.default_rng(5), times, p)
    settled = (k >= table.accept[:, 0]) | (k <= table.reject[:, 0])
    assert settled[:, -1].all()
    stop = settled.argmax(axis=1)
    n, successes = times[stop], k[np.arange(len(k)), stop]
    lower = sequence.lower(successes, n)
    assert np.sum(lower > p) <= most_failures(alpha)
    # What it says: the radius is within the tolerance of the best that was still possible.
    radius = sigma * stats.norm.ppf(np.maximum(lower, 0.5))
    best = sequence.lower(times[-1] - (n - successes), times[-1])
    hope = np.minimum(best, bounds.upper(sequence, successes, n))
    early = n < times[-1]
    assert np.all((sigma * stats.norm.ppf(np.maximum(hope, 0.5)) - radius)[early] <= tolerance)


@pytest.mark.parametrize("bound", ["betting", "union"])
def test_center_thresholds_are_tested_jointly(bound):
    """The mode that decides eps_out: many nested thresholds below the quantile, one alpha."""
    alpha, p, times = 0.01, 0.87, looking_times(10_000, 128)
    sequence = sequences.confidence_sequence(bound, alpha=alpha, n_max=10_000, step=128)
    inside = np.array([0.86, 0.868, 0.87])  # probabilities of thresholds at or below the quantile
    cells = np.diff(np.append(np.append(0.0, inside), 1.0))
    rng, trials = np.random.default_rng(6), np.diff(times, prepend=0)
    drawn = rng.multinomial(trials, cells, (NUM_SIMULATED, len(times)))
    k = drawn.cumsum(axis=1).cumsum(axis=2)[:, :, : len(inside)]
    accept = sequence.accepting(times, p)
    assert (k >= accept[:, None]).any(axis=(1, 2)).sum() <= most_failures(alpha)


@pytest.mark.parametrize("bound", ["betting", "union"])
def test_adaptive_decisions_take_18_times_fewer_samples(bound):
    """Mixed inputs of three kinds, radii 0.5 to 2 sigma, alpha 0.001, cap 100,000."""
    alpha, cap, size = 0.001, 100_000, 1000
    rng, times = np.random.default_rng(7), looking_times(cap, 128)
    radii = np.array([0.5, 1.0, 1.5, 2.0])
    sequence = sequences.confidence_sequence(bound, alpha=alpha, n_max=cap, step=128)
    table = level_table(sequence, times, stats.norm.cdf(radii))
    drawn, differ = [], []
    for a, b in ((1, 1), (5, 2), (9, 1)):
        p = rng.beta(a, b, size)
        k = rng.binomial(np.diff(times, prepend=0), p[:, None]).cumsum(axis=1)
        fixed = bounds.clopper_pearson_lower(k[:, -1], cap, alpha)
        for j, level in enumerate(stats.norm.cdf(radii)):
            yes, no = k >= table.accept[:, j], k <= table.reject[:, j]
            settled = yes | no
            stop = np.where(settled.any(axis=1), settled.argmax(axis=1), len(times) - 1)
            robust = yes[np.arange(size), stop]
            drawn.append(times[stop].mean())
            differ.append(np.mean(robust != (fixed >= level)))
            assert not np.any(robust & (p < level))
    assert cap / np.mean(drawn) >= 18
    assert np.mean(differ) <= alpha
