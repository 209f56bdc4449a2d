"""Which share of images is certified: by counting, and the cosine against its own formula."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import stats

from ur_jax.certify import CERTIFICATES, shares
from ur_jax.stats.intervals import proportion_interval


def read(curve, x):
    """What a step function says at x."""
    place = np.searchsorted(curve.x, x, side="right") - 1
    return [float(column[place]) for column in (curve.value, curve.low, curve.high)]


@pytest.mark.parametrize("values", [[], [0.4], [0.0, 0.3, 0.3, 0.1, 0.9]])
def test_shares_are_counted(values):
    values, total = np.array(values, np.float32), 7
    rising, falling = shares.at_most(values, total), shares.at_least(values, total)
    near = functools.partial(np.testing.assert_allclose, atol=1e-9)
    for x in (0.0, 0.05, 0.2, 0.35, 0.95):
        up, down = int(np.sum(values <= x)), int(np.sum(values > x))
        near(read(rising, x), proportion_interval(up, total)[:3])
        np.testing.assert_allclose(
            read(falling, x), proportion_interval(down, total)[:3], atol=1e-9
        )


def test_the_cosine_is_drawn_to_where_images_have_one():
    rng = np.random.default_rng(0)
    lower = np.append(rng.uniform(0.6, 0.99, 8), -1.0)
    cosine = np.append(rng.uniform(0.2, 0.9, 8), -1.0)[:, None]
    columns = {
        "lower": lower, "abstained": lower < 0, "num_bad": np.where(lower < 0, 3, 0),
        "cosine": np.concatenate([cosine, cosine - 0.1], 1),
    }  # fmt: skip
    against, share = CERTIFICATES["cosine"].curves(columns)
    # At a radius of k sigma: 2 Phi(Phi^-1((1 + lower) / 2) - k) - 1, while that is not negative.
    for k in (0.0, 0.5, 1.0, 1.5):
        place = int(np.flatnonzero(np.isclose(against.x, k))[0])
        each = 2 * stats.norm.cdf(stats.norm.ppf((1 + lower[:-1]) / 2) - k) - 1
        each = np.sort(np.append(np.where(each < 0, -1.0, each), -1.0))
        middle = each[4]  # of nine
        assert against.value[place] == pytest.approx(middle) if middle >= 0 else True
        assert np.isnan(against.value[place]) == (middle < 0)
    assert np.isnan(against.value[-1]) and np.nanmin(against.value) >= 0
    for c in (0.1, 0.5, 0.7):
        assert read(share, c)[0] == np.mean(cosine[:, 0] > c)
    assert share.value[0] == pytest.approx(8 / 9)  # one has no certificate
