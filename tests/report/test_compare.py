"""What is compared between encoders: columns, the best, rank correlations, the headline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import simulated

from ur_jax.report import collect, compare, paired
from ur_jax.runs import Row, Summary
from ur_jax.stats.intervals import median_interval
from ur_jax.types import Values


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Three encoders, weaker from one to the next."""
    folder = tmp_path_factory.mktemp("work")
    simulated.make(folder, ("strong", "middle", "weak"), 40, 6, 30, 50, pictures=False)
    return collect.collect(folder).numbers


@pytest.mark.parametrize(
    "ends, robust, expected",
    [
        ([(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)], "low", 0),
        ([(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)], "high", 2),
        ([(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)], "", None),  # neither is
        ([(0.1, 0.35), (0.3, 0.4), (0.5, 0.6)], "low", None),  # overlaps the second
        ([(0.1, 0.3), (0.3, 0.4)], "low", None),  # touches it
        ([(0.1, 0.2)], "low", None),  # nothing to compare with
        ([(0.1, 0.2), (math.nan, math.nan)], "low", None),
    ],
)
def test_best_only_where_the_interval_bears_it_out(ends, robust, expected):
    assert compare.best([Row("m", 0.0, a, b, 9) for a, b in ends], robust) == expected


def test_rank_correlation_from_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 9))
    found = compare.rank_correlation([*x, math.nan], [*y, 1.0])
    assert found is not None
    rank = lambda v: np.argsort(np.argsort(v))
    pairs = [(i, j) for i in range(9) for j in range(i)]
    concordance = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs]
    np.testing.assert_allclose(found.tau, np.mean(concordance))
    np.testing.assert_allclose(found.rho, np.corrcoef(rank(x), rank(y))[0, 1])
    assert found.n == 9
    # Few encoders: the p-value is exact, by all orders of 4 values.
    exact = compare.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40])
    assert exact is not None
    np.testing.assert_allclose(exact.p_value, 2 / 24)
    # An infinite value is the last in rank, whatever the others are.
    infinite = compare.rank_correlation([1, 2, math.inf], [3, 2, 1])
    assert infinite is not None and infinite.rho == pytest.approx(-1)
    assert compare.rank_correlation([1, 2], [1, 2]) is None
    assert compare.rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_columns_are_those_that_the_metrics_declare(numbers):
    found = compare.columns(numbers, labels=False)
    first = found[0]
    assert first.column.title == "universal quantile" and first.setting == "eps 0.05, step 5"
    assert set(first.cells) == {"strong", "middle", "weak"} and first.robust == "low"
    assert all(row.divergence == "l2" for row in first.cells.values())
    assert [(c.column.title, c.setting) for c in found] == [
        *((title, f"eps {eps}, step 5") for title in (
            "universal quantile", "universal quantile, targeted", "relative distance, targeted"
        ) for eps in (0.05, 0.1)),
        ("breakaway risk", "eps 0.05, step 25"),
        ("nearest neighbour, top 1", "eps 0.05, step 25"),
        ("margin ratio", "eps 0.05, step 10"),
        ("overlap risk", "eps 0.05, step 10"),
        ("certified divergence, quantile", ""),
        ("share with a certificate", ""),
    ]  # fmt: skip
    labelled = compare.columns(numbers, labels=True)
    assert [(c.column.title, c.setting) for c in labelled] == [
        *(("probe's accuracy, top 1", kind) for kind in ("low_pass", "noisy", "standard")),
        ("certified accuracy", "radius 0"),
        ("certified accuracy", "radius 0.25"),
        ("average certified radius", ""),
        ("impersonation", "eps 0.1, step 50, both"),
    ]


def test_a_column_is_of_one_kind_of_its_job():
    of = lambda job, **identity: Summary(job, "", identity, ())
    share = Row("certified", 0.5, 0.4, 0.6, 9)
    accuracy = lambda kind: Row("top_1_accuracy", 0.5, 0.4, 0.6, 9, images=kind)
    noisy = of("probe", views={"kind": "noisy"})
    numbers = [
        collect.Number("net", "a", of("certify", method="center"), share),
        collect.Number("net", "b", of("certify", method="randomized"), share),
        collect.Number("net", "c", noisy, accuracy("noisy")),
        collect.Number("net", "c", noisy, accuracy("standard")),
        collect.Number("net", "d", of("another"), accuracy("noisy")),
    ]
    [center] = compare.columns(numbers, labels=False)
    assert center.column.title == "share with a certificate" and center.cells == {"net": share}
    [probe] = compare.columns(numbers, labels=True)
    assert probe.setting == "noisy" and len(probe.cells) == 1


def test_correlations_are_of_all_encoders_that_have_both(numbers):
    ordered = [c for _, _, c, n in compare.correlations(numbers) if n == 3]
    assert -1.0 in {c.rho for c in ordered if c} and {c.n for c in ordered if c} == {3}


def test_the_headline_is_of_the_last_step(numbers):
    table = compare.headline(numbers)
    assert "attacks-0.05: universal_quantile (eps 0.05, step 5)" in table
    assert not any("cat -> dog" in name or "(l1" in name for name in table)
    row = table["certified-accuracy: certified_accuracy (radius 0.25)"]
    assert set(row) == {"strong", "middle", "weak"} and row["weak"].n == 30


def test_a_mean_without_known_bounds_is_not_compared():
    index, radius = np.arange(8), np.linspace(0.5, 3.0, 8)
    values = lambda metric, value: Values(metric, index, value)
    assert paired.compare_values(*[values("mean_radius", radius)] * 2) is None
    found = paired.compare_values(
        values("median_eps_out", radius), values("median_eps_out", 0 * radius)
    )
    assert found is not None and (found.higher, found.lower, found.equal) == (8, 0, 0)


def test_an_order_that_the_strongest_attack_turns_round_is_said_first():
    rng = np.random.default_rng(0)
    identity = {"stages": ["attacks", "strongest"], "protocol": {}}

    def found(**levels):
        """A run whose measures lie at some levels, on 40 images."""
        values = {m: np.clip(level + 0.01 * rng.random(40), 0, 1) for m, level in levels.items()}
        rows = tuple(Row.of(m, median_interval(v), divergence="l2", eps=0.05, step=20)
                     for m, v in values.items())  # fmt: skip
        kept = [Values(m, np.arange(40), v, divergence="l2", eps=0.05, step=20)
                for m, v in values.items()]  # fmt: skip
        return Summary("evaluate", "", identity, rows, values=tuple(kept))

    metric, strongest = "universal_quantile", "strongest_universal_quantile"
    weak, masked = found(**{metric: 0.5, strongest: 0.6}), found(**{metric: 0.1, strongest: 0.9})
    turned = paired.compare_summaries(weak, masked, ("weak", "masked"))
    [sentence] = turned.disagreements()
    assert "protocol's attack masked is more robust than weak" in sentence
    assert "weak is: believe the latter" in sentence
    printed = str(turned)
    assert printed.index("believe") < printed.index("verdict")  # first of all
    same = paired.compare_summaries(weak, found(**{metric: 0.1, strongest: 0.6}), ("a", "b"))
    [sentence] = same.disagreements()
    assert sentence.endswith("by the strongest attack found it is not decided.")
    agreed = paired.compare_summaries(weak, found(**{metric: 0.1, strongest: 0.2}), ("a", "b"))
    assert agreed.disagreements() == []
    for column in {verdict.column.metric: verdict.column for verdict in turned.verdicts}.values():
        masked_first = column.metric == metric
        assert turned.ranks(column)["masked"] == ((1, 1) if masked_first else (2, 2))
    undecided = next(v.column for v in same.verdicts if v.column.metric == strongest)
    assert same.ranks(undecided) == {"a": (1, 2), "b": (1, 2)}
