"""The one form of a reported number, printed, written and read."""

from __future__ import annotations

import dataclasses
import math

import pytest
from rich.console import Console

from ur_jax.metrics import METRICS
from ur_jax.runs import Row, Summary

LONGEST = max(METRICS, key=len)


def _printed(summary, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(summary)
    return capture.get().splitlines()


def _attacks(value=0.123456, low=0.1, high=0.2, **changes):
    """Rows as an evaluation with two radii has them."""
    return [
        Row(metric, value, low, high, 1000, divergence="l2", eps=eps, step=step, **changes)
        for metric in ("universal_quantile_targeted", "normalised_distance")
        for eps in (0.05, 0.1)
        for step in (5, 50)
    ]


@pytest.mark.parametrize(
    "rows",
    [
        _attacks(),
        _attacks(0.00042, 0.00021, 0.00083),
        [
            Row("impersonation_success", 0.5, 0.4, 0.6, 1000, eps=0.1, step=step, images=images)
            for step in (3, 50)
            for images in ("cat -> dog", "dog -> cat", "both")
        ],
        [Row("certified_accuracy", 0.5, 0.4, 0.6, 200, radius=r) for r in (0.0, 0.25)],
        [Row(name, 0.5, 0.4, 0.6, 10_000) for name in ("certified", "median_normalised")],
    ],
)
def test_80_columns_hold_every_row_in_one_line(rows):
    lines = _printed(Summary("evaluate", "title", {}, tuple(rows)), 80)
    assert max(map(len, lines)) <= 80
    numbers = [line.split() for line in lines if " to " in line]
    assert len(numbers) == len(rows)
    for words, row in zip(numbers, rows):
        assert words[0] == row.metric and words[-1] == METRICS[row.metric].robust
        shown = "0.0004" if row.value < 0.001 else f"{row.value:.3f}"
        assert words[-2] == str(row.n) and words[-6] == shown


def test_the_longest_name_folds_and_every_other_column_stays():
    row = Row(LONGEST, 0.5, 0.4, 0.6, 200)
    rows = (row, dataclasses.replace(row, radius=0.25))
    text = _printed(Summary("certify", "title", {}, rows), 70)
    assert sum("0.400 to 0.600" in line for line in text) == 2
    assert sum("high" in line for line in text) == 2


def test_a_setting_that_all_rows_share_is_told_once():
    rows = [Row("overlap_risk", 0.5, 0.4, 0.6, 9, eps=0.05, step=step) for step in (5, 10)]
    [title, header, *_] = _printed(Summary("evaluate", "title", {}, tuple(rows)), 80)
    assert title.strip() == "title, eps 0.05" and header.split()[:2] == ["metric", "step"]


def test_what_is_left_out_is_told_with_its_reason():
    rows = _attacks(n_excluded=2, excluded="two copies of an image")
    text = " ".join(_printed(Summary("evaluate", "title", {}, tuple(rows)), 80))
    assert text.count("1000 of 1002") == len(rows) and text.count("two copies") == 1
    assert "Left out of universal_quantile_targeted, normalised_distance" in text
    assert "Left out" not in str(Summary("evaluate", "title", {}, tuple(_attacks())))


def test_brackets_in_a_title_are_text():
    summary = Summary("evaluate", "evaluate: [bold]net[/bold] on [/a]", {}, tuple(_attacks()))
    assert "[bold]net[/bold] on [/a]" in _printed(summary, 80)[0]


def test_written_and_read_it_is_the_same(tmp_path):
    rows = (
        *_attacks(n_excluded=1, excluded="why"),
        Row("median_eps_out", math.inf, math.nan, math.nan, 9),  # robust is low
        Row("adversarial_margin", -math.inf, math.nan, math.nan, 9),  # robust is high
    )
    made = Summary("evaluate", "title", {"seed": 0, "requires": {"probe": "a"}}, rows, {"x": "why"})
    made.write(tmp_path)
    read = Summary.read(tmp_path / "summary.json")
    assert repr(read.rows) == repr(rows) and read == dataclasses.replace(made, rows=read.rows)
    # What another job made is no setting.
    other = dataclasses.replace(made, identity={"seed": 0, "requires": {"probe": "b"}})
    assert read.config == made.config == other.config
    assert repr(read) == "Summary('title', 10 numbers)"
    assert read.to_arrow().num_rows == 10 and "n_excluded" in read.to_arrow().column_names
