"""What the page's figures tell is what the tables say, and what is not drawn is said."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pytest
import simulated
from scipy import stats

from ur_jax import runs
from ur_jax.report import collect, drawn, figures
from ur_jax.report.page import Figure, Paragraph
from ur_jax.runs import Summary
from ur_jax.types import Curve

ENCODERS = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Five encoders; of one of them the strongest attack, too."""
    folder = tmp_path_factory.mktemp("work")
    simulated.make(folder, ENCODERS, 12, 6, 20, 40, pictures=False)
    rng = np.random.default_rng(0)
    columns = {
        "image": np.repeat(np.arange(12), 4), "eps": np.full(48, 0.05),
        "dist_l2": rng.random(48).astype(np.float32),
    }  # fmt: skip
    runs.write_table(folder / "b" / "strongest-0.05" / "strongest.parquet", columns)
    identity = {"stages": ["strongest"], "protocol": {"strong_steps": 7, "strong_eps": [0.05]}}
    Summary("evaluate", "", identity, ()).write(folder / "b" / "strongest-0.05")
    collect.write_csv(folder / "RESULTS.csv", collect.collect(folder).numbers)
    return folder


@pytest.fixture(autouse=True)
def _nothing_saved(monkeypatch):
    monkeypatch.setattr(figures, "save", lambda *_: None)


def five_digits(values):
    return [float(f"{value:.5g}") for value in np.asarray(values).tolist()]


def test_the_strongest_attack_stands_beside_the_papers(workdir):
    problems = []
    blocks = list(drawn.curves(collect.collect(workdir), ENCODERS, workdir, problems))
    shown = {b.files.split(".png")[0]: b for b in blocks if isinstance(b, Figure)}
    assert not problems
    first = shown["figures/distance-eps-0.05"]
    panel = first.data["panels"][0]
    curves = {curve["name"]: curve for curve in panel["curves"]}
    assert list(curves) == ["a", "b", "b, strongest found", "c", "d", "e"]
    rows = Summary.read(workdir / "b" / "distances" / "summary.json").rows
    [median] = [row.value for row in rows if row.divergence == "l2"]
    table = runs.read_table(workdir / "b" / "attacks-0.05" / "attacks.parquet")
    paper = table["dist_l2"][table["mode"] == "untargeted"].reshape(12, 6).astype(np.float64)
    assert curves["b"]["value"] == five_digits(np.median(paper, 0) / median)
    far = runs.read_table(workdir / "b" / "strongest-0.05" / "strongest.parquet")["dist_l2"]
    worst = far.astype(np.float64).reshape(12, 4).max(1) / median
    mark = curves["b, strongest found"]
    assert (mark["owner"], mark["is_mark"], mark["x"]) == ("b", True, [7.0])
    assert mark["color"] == curves["b"]["color"]
    assert mark["value"] == five_digits([np.median(worst)])
    assert "ends of its runs" in first.caption
    assert all(f'id="{curve["id"]}"' in first.svg for curve in panel["curves"])
    assert panel["value"]["limits"][1] > mark["high"][0]  # nothing is cut off
    assert "strongest" not in shown["figures/distance-eps-0.1"].caption
    # What there is none of is named, with the command.
    last = blocks[-1]
    assert isinstance(last, Paragraph)
    assert last.text.startswith("Not drawn") and "certify --method cosine" in last.text
    assert "strongest" not in last.text and "targeted" not in last.text


def test_rank_correlations_are_those_of_the_numbers(workdir):
    blocks = list(drawn.correlation(collect.collect(workdir), workdir))
    assert isinstance(blocks[0], Figure)
    [panel] = blocks[0].data["panels"]
    with open(workdir / "RESULTS.csv", newline="") as file:
        lines = list(csv.DictReader(file))

    def of(**wanted):
        each = [r for r in lines if all(r[k] == v for k, v in wanted.items())]
        return [float(r["value"]) for r in sorted(each, key=lambda r: r["encoder"])]

    quantile = {"metric": "universal_quantile", "divergence": "l2", "eps": "0.05", "step": "5"}
    margin = {"metric": "adversarial_margin", "divergence": "l2"}
    curves = {curve["name"]: curve for curve in panel["curves"]}
    assert set(curves) == {f"probe, {kind}" for kind in ("standard", "noisy", "low_pass")}
    for row, first, sign in (
        ("universal quantile, eps 0.05, step 5", of(**quantile), -1),  # robust when low
        ("margin ratio, eps 0.05, step 10", of(**margin), 1),
    ):
        for name, curve in curves.items():
            place = panel["rows"].index(row)
            probe = of(metric="top_1_accuracy", images=name.removeprefix("probe, "))
            rho: Any = stats.spearmanr(first, probe)
            tau: Any = stats.kendalltau(first, probe)
            assert curve["value"][place] == five_digits([sign * rho.statistic])[0]
            told = f"tau {sign * tau.statistic:.2f}, p {tau.pvalue:.2g}, n = 5"
            assert curve["told"][place] == told


def test_without_probes_there_is_a_reason_instead_of_the_figure(workdir):
    found = collect.collect(workdir)
    kept = {place: s for place, s in found.summaries.items() if not place[1].startswith("probe")}
    blocks = list(drawn.correlation(found._replace(summaries=kept), workdir))
    assert not any(isinstance(block, Figure) for block in blocks)
    assert "fewer than 3 encoders have a probe" in str(blocks[0])
    kept = {place: s for place, s in found.summaries.items() if place[0] in "ab"}
    [only] = drawn.correlation(found._replace(summaries=kept), workdir)
    assert "at least 3 encoders" in str(only)


def test_encoders_are_told_apart_without_colour():
    looks = [figures.look(place) for place in range(32)]
    assert len({(look.color, look.line) for look in looks}) == 32
    assert len({look.marker for look in looks[:8]}) == 8
    assert all(a.line != b.line for a, b in zip(looks, looks[1:]))


def test_curves_without_a_finite_point_are_drawn_as_nothing():
    nothing, x = np.full(3, np.nan), np.arange(3.0)
    line = Curve("f", "p", "x", "y", "", x, nothing, nothing, nothing)
    mark = Curve("f", "p", "x", "y", "", x, np.full(3, np.inf), kind="mark", series="more")
    panels = {"p": {"a": line, "a, more": mark}}
    figure = figures.draw(panels, ("a",))
    figures.to_svg(figure)
    curves = figures.data_of(figure, panels, ("a",))["panels"][0]["curves"]
    assert [(c["owner"], c["value"]) for c in curves] == [("a", [None] * 3), ("a", [None] * 3)]
