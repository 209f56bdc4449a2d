"""Paired comparisons: McNemar and the sign test from their definitions, coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ur_jax.errors import UserError
from ur_jax.stats import paired


def tail(k, n):
    """P(Binomial(n, 1/2) <= k)."""
    return sum(math.comb(n, i) for i in range(k + 1)) / 2**n


@pytest.mark.parametrize("statistic", ["median", "proportion", "mean"])
def test_the_test_is_exact_where_only_signs_count(statistic):
    """10 images of 16 favour the first, 2 the second: McNemar's and the sign test are the same."""
    first = np.array([1.0] * 10 + [0.0] * 2 + [1.0] * 4)
    second = np.array([0.0] * 10 + [1.0] * 2 + [1.0] * 4)
    found = paired.compare(first, second, statistic=statistic)
    assert (found.higher, found.lower, found.equal) == (10, 2, 4)
    exact = 2 * tail(2, 12)
    drawn = statistic == "mean"  # Gaffke's, which is McNemar's for such values
    # 10,000 draws: five standard deviations of the share that is twice the p-value's half.
    margin = 10 * math.sqrt(exact / 2 / 10_000) if drawn else 1e-12
    assert found.p_value == pytest.approx(exact, abs=margin)
    back = paired.compare(second, first, statistic=statistic)
    assert back.difference.value == -found.difference.value


def test_the_interval_agrees_with_the_test():
    rng = np.random.default_rng(0)
    for _ in range(40):
        x, y = rng.random(24) ** 3, rng.random(24)
        for statistic in ("median", "mean"):
            found = paired.compare(x, y, statistic=statistic)
            excludes = not found.difference.low <= 0 <= found.difference.high
            assert excludes == (found.p_value < 0.05) or abs(found.p_value - 0.05) < 0.01


def skewed(rng, n):
    """Shares of which most are 0, as a breakaway risk's."""
    return np.where(rng.random(n) < 0.9, 0.0, rng.random(n))


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize(
    "statistic, draw, truth",
    [
        ("median", lambda rng, n: (rng.exponential(size=n), np.zeros(n)), math.log(2)),  # skew
        ("median", lambda rng, n: tuple(rng.integers(0, 2, (2, n)).astype(float)), 0.0),  # ties
        ("proportion", lambda rng, n: tuple(rng.random((2, n)) < [[0.9], [0.6]]), 0.3),
        ("mean", lambda rng, n: (skewed(rng, n), rng.random(n) ** 2), 0.05 - 1 / 3),
    ],
)
def test_it_covers_what_it_says(statistic, draw, truth, n, monkeypatch):
    """At least 93 of 100 by 1,000 samples: at a coverage of .95, 1 run in 600 would fail."""
    monkeypatch.setattr(paired, "_NUM_DRAWS", 1000)
    rng, covered = np.random.default_rng(n), 0
    for _ in range(1000):
        low, high = paired.compare(*draw(rng, n), statistic=statistic).difference[1:3]
        covered += low <= truth <= high
    assert covered >= 930


def test_infinite_values_and_what_is_refused():
    found = paired.compare([np.inf, 1.0, np.inf], [np.inf, np.inf, 2.0], statistic="median")
    assert (found.higher, found.lower, found.equal) == (1, 1, 1) and found.difference.value == 0
    with pytest.raises(UserError, match="the same images"):
        paired.compare([1.0], [1.0, 2.0], statistic="median")
    with pytest.raises(UserError, match="NaN"):
        paired.compare([np.nan], [1.0], statistic="median")
    with pytest.raises(UserError, match="bounds"):
        paired.compare([3.0], [1.0], statistic="mean")


def test_holm_from_its_definition():
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([]) == [] and paired.holm([0.9, 0.8]) == [1.0, 1.0]


def test_how_many_more_images():
    """60 % of the images in favour: about 94 decide at 5 % (96.04 by the normal score)."""
    x = np.array([1.0] * 24 + [0.0] * 16)
    found = paired.compare(x, 1 - x, statistic="median")
    more = found.more_images(0.05)
    assert more is not None and 40 < more + 40 < 160 and found.more_images(0.99) == 0
    assert paired.compare(x, x, statistic="median").more_images(0.05) is None
