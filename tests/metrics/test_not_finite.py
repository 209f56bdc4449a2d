"""Representations that are NaN, infinite or beyond float32's squares: the worst, or refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ur_jax import distances, metrics
from ur_jax.devices import data_mesh
from ur_jax.errors import UserError

RNG = np.random.default_rng(0)
BANK = RNG.standard_normal((40, 8)).astype(np.float32)
OWN = np.arange(10)
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "beyond squares": 1e25}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("divergence", distances.DIVERGENCES)
def test_an_attacked_representation_that_is_lost_has_all_others_nearer(bad, divergence):
    if divergence == "cosine" and bad == 1e25:
        pytest.skip("it has a direction")
    attacked = BANK[:10] + np.float32(0.01)
    expected = metrics.neighbour_ranks(
        attacked, BANK[:10], BANK, own_index=OWN, divergence=divergence, block_size=16
    )
    attacked[[2, 5], 3] = bad
    for mesh in (None, data_mesh()):
        ranks = metrics.neighbour_ranks(
            attacked, BANK[:10], BANK,
            own_index=OWN, divergence=divergence, block_size=16, mesh=mesh,
        )  # fmt: skip
        lost = np.isin(OWN, (2, 5))
        np.testing.assert_array_equal(ranks.rank, np.where(lost, 39, expected.rank))
        np.testing.assert_array_equal(metrics.breakaway_risk(ranks)[lost], 1.0)
        np.testing.assert_array_equal(metrics.nearest_neighbour_hits(ranks, k=5)[lost], 0.0)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("divergence", distances.DIVERGENCES)
def test_a_pair_with_a_lost_representation_has_the_worst_margin(bad, divergence):
    x, y, x_to_y, y_to_x = RNG.standard_normal((4, 6, 8)).astype(np.float32)
    margin = lambda *pairs: np.asarray(metrics.adversarial_margin(*pairs, divergence=divergence))
    expected = margin(x, y, x_to_y, y_to_x)
    x_to_y[1, 0], y_to_x[4, 7] = bad, bad
    margins = margin(x, y, x_to_y, y_to_x)
    np.testing.assert_array_equal(margins, np.where(np.isin(range(6), (1, 4)), -np.inf, expected))
    assert metrics.overlap_risk(margins)[1] == 1.0
    # Of two copies of an image there is no margin: undefined is not lost.
    copies = margin(x, x, y, x_to_y)
    np.testing.assert_array_equal(np.isneginf(copies), np.arange(6) == 1)
    assert np.isnan(copies[[0, 2, 3]]).all() or divergence == "cosine"  # there copies are apart


@pytest.mark.parametrize("scale", [1e19, 1e30, 1e-15, 1e-25])
def test_a_scale_that_squares_do_not_hold_is_refused(scale):
    """An encoder times 1e19 looked perfectly robust: cosine 1, breakaway 0."""
    bank = BANK * np.float32(scale)
    attacked = bank[::-1][:10].copy()
    calls = (
        lambda: metrics.neighbour_ranks(attacked, bank[:10], bank, own_index=OWN),
        lambda: metrics.nearest_neighbours(bank[:3], bank, k=2),
        lambda: metrics.distance_distribution(bank, jax.random.key(0)),
        lambda: metrics.knn_classify(bank, np.arange(40) % 3, bank[:4], k=3),
    )
    for call in calls:
        with pytest.raises(UserError, match="scale|constant"):
            call()


def test_scales_in_range_give_the_same_ranks():
    attacked = BANK[::-1][:10]
    ranks = [
        metrics.neighbour_ranks(attacked * s, BANK[:10] * s, BANK * s, own_index=OWN).rank
        for s in np.float32([2.0**-30, 1.0, 2.0**40])
    ]
    np.testing.assert_array_equal(ranks[0], ranks[1])
    np.testing.assert_array_equal(ranks[2], ranks[1])


def test_a_distribution_is_asked_about_its_own_divergence():
    distribution = metrics.distance_distribution(BANK, jax.random.key(0), divergence="l1")
    for measure in (metrics.universal_quantile, metrics.normalised_distance):
        expected = measure(distribution, np.float32([1.0]))
        np.testing.assert_array_equal(
            measure(distribution, np.float32([1.0]), divergence="l1"), expected
        )
        with pytest.raises(UserError, match="Expected distances by l1.* got l2"):
            measure(distribution, np.float32([1.0]), divergence="l2")
