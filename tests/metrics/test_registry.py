"""What the metrics declare."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from ur_jax.jobs import JOBS
from ur_jax.metrics import METRICS, Column, Metric, summarise
from ur_jax.stats import intervals

REPORTED = {
    "evaluate": {
        *("universal_quantile", "universal_quantile_targeted", "relative_quantile"),
        *("normalised_distance", "cosine_similarity", "breakaway_risk", "top_1_accuracy"),
        *("top_5_accuracy", "adversarial_margin", "overlap_risk", "median_clean_distance"),
        *("strongest_universal_quantile", "strongest_normalised_distance"),
        *("strongest_breakaway_risk", "strongest_top_1_accuracy", "strongest_top_5_accuracy"),
    },
    "certify": {
        *("certified", "median_eps_out", "median_quantile", "median_normalised"),
        *("certified_accuracy", "average_certified_radius", "mean_radius"),
        *("average_certified_radius_correct_only", "smoothed_eps_out", "smoothed_quantile"),
        *("smoothed_eps_out_population", "smoothed_normalised", "certified_cosine"),
        "certified_over_found",
        "certified_neighbour",
    },
    "attack-certificates": {"certificates_broken", "moved_over_certified"},
    "probe": {"top_1_accuracy", "top_5_accuracy"},
    "impersonate": {"impersonation_success"},
    "knn": {"knn_accuracy"},
}
LOW = {
    *("universal_quantile", "normalised_distance", "breakaway_risk", "overlap_risk"),
    *("median_eps_out", "median_quantile", "median_normalised", "impersonation_success"),
    *("smoothed_eps_out", "smoothed_eps_out_population", "smoothed_quantile"),
    *("smoothed_normalised", "certificates_broken"),
    *("strongest_universal_quantile", "strongest_normalised_distance", "strongest_breakaway_risk"),
}


def test_every_number_of_every_job_is_declared():
    declared: dict[str, set[str]] = {}
    for name, metric in METRICS.items():
        assert metric.columns and metric.definition.endswith("."), name
        assert len({column.job for column in metric.columns}) == len(metric.columns)
        for column in metric.columns:
            declared.setdefault(column.job, set()).add(name)
    assert {job: declared[job] for job in REPORTED} == REPORTED
    assert set(REPORTED) <= set(JOBS)
    assert {name for name, metric in METRICS.items() if metric.robust == "low"} == LOW
    assert METRICS["median_clean_distance"].robust == ""


def test_the_statistic_selects_the_interval():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    metrics = {name: Metric(name, "low", "A test.") for name in ("median", "mean", "proportion")}
    expected = {
        "median": intervals.median_interval(values),
        "mean": intervals.mean_interval(values),
        "proportion": intervals.proportion_interval(5, 8),
    }
    for name, metric in metrics.items():
        with METRICS.replaced("toy", metric):
            assert summarise("toy", values) == expected[name]
    assert "toy" not in METRICS


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Metric("mode", "low", "A test."), "Unknown statistic 'mode'"),
        (lambda: Metric("mean", "up", "A test."), "'low', 'high' or ''.*'up'"),
        (lambda: METRICS.register("a metric", Metric("mean", "low", "A test.")), "without spaces"),
        (lambda: METRICS.register("certified", Metric("mean", "low", "A test.")), "already"),
        (
            lambda: METRICS.register("mine")(cast(Any, len)),
            r"Metric\(...\) as the metric 'mine', got builtin",
        ),
        (lambda: METRICS.register(cast(Any, len)), "in quotes, got <built-in function len>"),
        (lambda: METRICS["overlap"], "did you mean 'overlap_risk'"),
    ],
)
def test_what_cannot_be_declared_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_metric_is_short_to_print():
    assert len(repr(METRICS["certified_accuracy"])) < 500
    assert repr(METRICS) == f"Registry('metric', {len(METRICS)} names)"
    assert len(repr(Column("job", "title"))) < 200
