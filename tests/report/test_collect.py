"""The table of a working directory, what is compared between encoders, and the report's page."""

from __future__ import annotations

import csv
import html.parser
import re

import numpy as np
import pytest
import report
import simulated
from PIL import Image
from scipy import stats

from ur_jax import runs
from ur_jax.report import collect as results
from ur_jax.report import compare, figures, page
from ur_jax.stats.intervals import Estimate


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Three encoders, weaker from one to the next, with few images."""
    folder = tmp_path_factory.mktemp("work")
    simulated.make(folder, ("strong", "middle", "weak"), 40, 6, 30, 50)
    return folder


@pytest.fixture(scope="module")
def found(workdir):
    return results.collect(workdir)


def test_the_table_has_every_number_and_the_same_bytes(workdir, found, tmp_path):
    assert len(found.summaries) == 33 and not found.damaged
    assert len(found.rows) == sum(len(s["metrics"]) for s in found.summaries.values())
    for name in ("a", "b"):
        results.write_csv(tmp_path / name, results.collect(workdir).rows)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with open(tmp_path / "a", newline="") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == results.COLUMNS and len(read) == len(found.rows)
    for line, row in zip(read, found.rows):
        assert line["value"] == "" if row["value"] is None else float(line["value"]) == row["value"]
        assert line["radius"] == ("" if row["radius"] is None else str(row["radius"]))
    keys = [tuple(line[name] for name in results.COLUMNS[1:9]) for line in read]
    assert len(set(keys)) == len(keys)


def test_a_damaged_or_older_summary_is_named_and_the_others_are_read(workdir, found, tmp_path):
    for stage, text in (("half", '{"schema": 2, "met'), ("older", '{"schema": 1, "metrics": {}}')):
        path = tmp_path / "net" / stage / "summary.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    good = (workdir / "weak" / "overlap" / "summary.json").read_text()
    (tmp_path / "net" / "overlap").mkdir()
    (tmp_path / "net" / "overlap" / "summary.json").write_text(good)
    here = results.collect(tmp_path)
    assert set(here.summaries) == {("net", "overlap")}
    assert "schema 2, got 1" in here.damaged["net", "older"] and ("net", "half") in here.damaged
    with pytest.raises(ValueError, match="none at"):
        results.collect(tmp_path / "nowhere")


def test_rows_name_their_settings():
    estimate = Estimate(0.5, 0.4, 0.6, 10)
    rows = results.named_rows({"certified accuracy at radius 0.25": estimate, "a b, c": estimate})
    assert [(r["metric"], r["radius"], r["low"]) for r in rows] == [
        ("certified_accuracy", 0.25, 0.4),
        ("a_b_c", None, 0.4),
    ]
    assert set(rows[0]) == {"metric", *results.SETTINGS, "value", "low", "high", "n"}


@pytest.mark.parametrize(
    "ends, robust, expected",
    [
        ([(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)], "low", 0),
        ([(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)], "high", 2),
        ([(0.1, 0.35), (0.3, 0.4), (0.5, 0.6)], "low", None),  # overlaps the second
        ([(0.1, 0.3), (0.3, 0.4)], "low", None),  # touches it
        ([(0.1, 0.2)], "low", None),  # nothing to compare with
        ([(0.1, 0.2), (None, None)], "low", None),
    ],
)
def test_best_only_where_the_interval_bears_it_out(ends, robust, expected):
    assert results.best([{"low": a, "high": b} for a, b in ends], robust) == expected


def test_rank_correlation_from_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 9))
    found = results.rank_correlation([*x, None], [*y, 1.0])
    rank = lambda v: np.argsort(np.argsort(v))
    pairs = [(i, j) for i in range(9) for j in range(i)]
    concordance = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs]
    np.testing.assert_allclose(found.tau, np.mean(concordance))
    np.testing.assert_allclose(found.rho, np.corrcoef(rank(x), rank(y))[0, 1])
    assert found.n == 9
    # Few encoders: the p-value is exact, by all orders of 4 values.
    exact = results.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]).p_value
    np.testing.assert_allclose(exact, 2 / 24)
    assert results.rank_correlation([1, 2], [1, 2]) is None
    assert results.rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_curves_are_medians_and_shares_of_the_tables(workdir, found):
    table = runs.read_table(workdir / "weak" / "attacks-0.1" / "attacks.parquet")
    curves = compare.attack_curves(workdir, found.summaries, 0.1)
    scale = compare.median_clean_distance(found.summaries, "weak")
    at = lambda mode, step: table["dist_l2"][(table["mode"] == mode) & (table["step"] == step)]
    for step in range(6):
        moved = np.median(at("untargeted", step).astype(np.float64)) / scale
        np.testing.assert_allclose(curves["untargeted"]["weak"].value[step], moved)
        ratio = at("targeted", step).astype(np.float64) / at("targeted", 0)
        curve = curves["targeted"]["weak"]
        np.testing.assert_allclose(curve.value[step], np.median(ratio))
        assert curve.low[step] <= curve.value[step] <= curve.high[step]

    table = runs.read_table(workdir / "weak" / "certified-accuracy" / "certificates.parquet")
    curve = compare.accuracy_curves(workdir, found.summaries)["weak"]
    correct = ~table["abstained"] & (table["predicted"] == table["label"])
    for radius in (0.0, 0.05, 0.3, 0.89):
        place = np.searchsorted(curve.x, radius, side="right") - 1
        # Right after a radius: the curve drops at each, the table counts radius >= r.
        np.testing.assert_allclose(
            curve.value[place], np.mean(correct & (table["radius"] > radius)), atol=1e-12
        )
    assert np.all(np.diff(curve.value) <= 0)

    table = runs.read_table(workdir / "weak" / "certified-divergence" / "certificates.parquet")
    curve = compare.divergence_curves(workdir, found.summaries, "quantile")["weak"]
    for x in (0.2, 0.5, 0.9):
        share = np.mean(~table["abstained"] & (table["quantile"] <= x))
        np.testing.assert_allclose(curve.value[np.searchsorted(curve.x, x, "right") - 1], share)


def test_columns_take_the_last_step_by_l2(found):
    columns = compare.columns(found.rows, labels=False)
    first = columns[0]
    assert first.headline.metric == "universal_quantile" and first.setting == "eps 0.05, step 5"
    assert set(first.cells) == {"strong", "middle", "weak"}
    assert all(cell["divergence"] == "l2" for cell in first.cells.values())
    probes = [c for c in compare.columns(found.rows, labels=True) if "probe" in c.headline.title]
    assert {c.setting for c in probes} == {"standard", "noisy", "low_pass"}
    ordered = [c for _, _, c, n in compare.correlations(found.rows) if n == 3]
    assert stats.spearmanr([1, 2, 3], [3, 2, 1]).statistic in {c.rho for c in ordered if c}


class Links(html.parser.HTMLParser):
    """Collects what a page refers to, and the elements left open."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attributes):
        void = ("meta", "img", "input", "br", "path", "use", "image", "rect", "link")
        if tag not in void:
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_report_is_one_file(workdir, found, capsys):
    report.main(report.Config(workdir))
    text = (workdir / "report.html").read_text()
    parsed = Links()
    parsed.feed(text)
    assert not parsed.open, parsed.open
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert not re.search(r"url\((?!['\"]?[#d])|@import|fetch\(|XMLHttp", text)
    # The strong one is best by the universal quantile; every figure is there, on any ground.
    assert re.search(r"<td>strong</td><td class=\"best\"", text)
    assert text.count("<svg") == 5 and "currentColor" in text and figures._INK not in text
    assert text.count("data:image/webp") == 6
    assert "every planned stage is finished" in text
    for path in sorted((workdir / "figures").glob("*.png")):
        assert Image.open(path).size[0] > 800 and path.with_suffix(".pdf").stat().st_size > 1000
    assert len(list((workdir / "figures").glob("*.png"))) == 5
    assert "33 stages" in capsys.readouterr().out
    pdf = workdir / "figures" / "margin-ratio.pdf"
    before = pdf.read_bytes()
    figures.save(
        figures.margin_figure(compare.margins(workdir, found.summaries)), pdf.with_suffix("")
    )
    assert pdf.read_bytes() == before


def test_the_report_says_what_is_missing(tmp_path):
    stages = {"overlap": "", "breakaway": "It needs <b>more</b> images."}
    plan = {"command": "python x --only 'a'", "stages": stages}
    runs.write_json(tmp_path / "a<i>" / "plan.json", plan)
    record = {"finished": False, "error": "Traceback\nValueError: too few images\n"}
    runs.write_json(tmp_path / "a<i>" / "overlap.json", record)
    report.main(report.Config(tmp_path))
    text = (tmp_path / "report.html").read_text()
    assert "ValueError: too few images" in text and "a&lt;i&gt;" in text
    assert "<b>more" not in text and "&lt;b&gt;more" in text and "--only &#x27;a&#x27;" in text
    assert (tmp_path / "RESULTS.csv").read_text() == ",".join(results.COLUMNS) + "\n"


def test_numbers_near_zero_keep_their_digits():
    row = {"value": 0.00042, "low": 0.0, "high": 1.0, "n": 3, "encoder": "a"}
    headline = compare.HEADLINES[0]
    column = compare.Column(headline, "", "low", {"a": row})
    assert "0.00042<small>0.000 to 1.000" in page.comparison_table(["a", "b"], [column])
    row = row | {"value": None, "low": None, "high": None}
    column = compare.Column(headline, "", "low", {"a": row})
    shown = page.comparison_table(["a", "b"], [column])
    assert "no finite value" in shown and "missing" in shown
