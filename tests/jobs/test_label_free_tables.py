"""From parts to numbers: what has no value is left out by name."""

from __future__ import annotations

import numpy as np

from ur_jax import runs
from ur_jax.jobs import label_free_tables as tables
from ur_jax.jobs.label_free import EvaluationConfig


def test_pairs_without_a_margin_are_counted_and_said(tmp_path):
    run = runs.open_run(tmp_path / "run", {})
    margins = np.array([0.5, -0.5, np.nan, 0.25, np.nan], np.float32)
    part = {"index": np.arange(5), "second": np.arange(5, 10), "unreadable": np.empty((0, 2), "U1")}
    for d in tables.DIVERGENCES:
        part[f"margin_{d}"] = margins if d == "l2" else np.abs(np.nan_to_num(margins))
        part[f"clean_dist_{d}"] = np.where(np.isnan(margins), 0, 1).astype(np.float32)
    run.write_part("overlap", 0, part)
    rows = {
        (row.metric, row.divergence): row for row in tables.overlap_rows(run, EvaluationConfig())
    }
    risk, margin = rows["overlap_risk", "l2"], rows["adversarial_margin", "l2"]
    assert (risk.value, risk.n, risk.n_excluded) == (1 / 3, 3, 2)
    assert (margin.value, margin.n, margin.n_excluded) == (0.25, 3, 2)
    assert "two copies" in risk.excluded
    whole = rows["overlap_risk", "l1"]
    assert (whole.n, whole.n_excluded, whole.excluded) == (5, 0, "")
