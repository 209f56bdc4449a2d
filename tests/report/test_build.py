"""The page: one file, everything in it, whatever is damaged beside it."""

from __future__ import annotations

import html
import html.parser
import re
import sys
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
import simulated
from PIL import Image

from ur_jax import runs
from ur_jax.jobs import JOBS
from ur_jax.metrics import METRICS
from ur_jax.report import build, collect, figures, page
from ur_jax.report.compare import Compared
from ur_jax.runs import Row, Summary
from ur_jax.types import Curve


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Three encoders, weaker from one to the next, with few images."""
    folder = tmp_path_factory.mktemp("work")
    simulated.make(folder, ("strong", "middle", "weak"), 40, 6, 30, 50)
    return folder


class Links(html.parser.HTMLParser):
    """Collects what a page refers to, and the elements left open."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attrs):
        void = ("meta", "img", "input", "br", "path", "use", "image", "rect", "link")
        if tag not in void:
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_report_is_one_file(workdir, tmp_path, capsys):
    assert build.main(build.Config(workdir)) == 0
    text = (workdir / "report.html").read_text()
    parsed = Links()
    parsed.feed(text)
    assert text.startswith("<!doctype html>") and not parsed.open, parsed.open
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert not re.search(r"url\((?!['\"]?[#d])|@import|fetch\(|XMLHttp", text)
    # The strong one is best by the universal quantile; every figure is there, on any ground.
    table = text[text.index('id="labels-free"') :]  # columns: middle, strong, weak
    found = r"<span>universal quantile</span><small>eps 0.05(.*?)</tr>"
    row = re.search(found, table, re.S)
    assert row and re.findall(r"<td class=\"(best)\"|<td", row[1]) == ["", "best", ""]
    assert "strong &gt; " in text and "Two by two (3 pairs)" in text
    assert re.search(r"more robust than every other one: strong by \d+", text)
    assert re.search(r"strong is better on \d\d of 40 images", text)
    assert METRICS["universal_quantile"].definition in text and "section 4" in text
    names = ["certified-accuracy", "certified-divergence"]
    names += ["distance-eps-0.05", "distance-eps-0.1", "margin-ratio", "rank-correlation"]
    assert sorted(path.stem for path in (workdir / "figures").glob("*.png")) == names
    assert text.count("<svg") == 6 and "currentColor" in text and figures._INK not in text
    assert text.count("data:image/webp") == 6
    assert "every planned stage is finished" in text
    for name in names:
        path = workdir / "figures" / f"{name}.png"
        assert Image.open(path).size[0] > 800 and path.with_suffix(".pdf").stat().st_size > 1000
    assert "33 stages" in capsys.readouterr().out
    curves, _ = figures.gather(collect.collect(workdir))
    figure = figures.draw(curves["margin-ratio"], ("middle", "strong", "weak"))
    figures.save(figure, tmp_path / "again")  # the same bytes
    saved = (workdir / "figures" / "margin-ratio.pdf").read_bytes()
    assert (tmp_path / "again.pdf").read_bytes() == saved


def test_the_report_says_what_is_missing(tmp_path):
    stages = {"overlap": "", "breakaway": "It needs <b>more</b> images."}
    plan = {"command": "ur-jax x --only 'a'", "stages": stages}
    runs.write_json(tmp_path / "a<i>" / "plan.json", plan)
    record = {"fingerprint": "0", "finished": False}
    record |= {"error": "Traceback\nValueError: too few images\n"}
    runs.write_json(tmp_path / "a<i>" / "overlap.json", record)
    assert build.main(build.Config(tmp_path)) == 0
    text = (tmp_path / "report.html").read_text()
    assert "ValueError: too few images" in text and "a&lt;i&gt;" in text
    assert "<b>more" not in text and "&lt;b&gt;more" in text
    assert "--only 'a'" in html.unescape(text)
    assert (tmp_path / "RESULTS.csv").read_text() == ",".join(collect.COLUMNS) + "\n"


@pytest.mark.filterwarnings("ignore:.*is damaged:UserWarning")
def test_a_damaged_file_is_named_and_everything_else_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda *_: None)
    monkeypatch.setattr(figures, "to_svg", lambda _: "")
    simulated.make(tmp_path, ("a", "b"), 12, 4, 12, 12)
    copy, extra = tmp_path / "a" / "overlap" / "summary.json", tmp_path / "a" / "extra"
    extra.mkdir()
    (extra / "summary.json").write_bytes(copy.read_bytes())  # of a stage that no plan has
    total = len(collect.collect(tmp_path).numbers)
    damaged = [
        *("a/overlap/summary.json", "a/extra/summary.json", "b/overlap/pairs.parquet"),
        *("b/breakaway/gallery.png", "b/plan.json", "b/attacks-0.1/attacks.parquet"),
    ]
    for name in [*damaged, "a/attacks-0.05.json"]:  # which only tells how long that stage took
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "b" / "attacks-0.1" / "attacks.parquet").unlink()
    assert build.main(build.Config(tmp_path)) == 1
    text = html.unescape((tmp_path / "report.html").read_text())
    lines = (tmp_path / "RESULTS.csv").read_text().splitlines()
    assert len(lines) == 1 + total - 4
    printed, missing = capsys.readouterr().out, text.partition('id="missing"')[2]
    assert f"{total - 4} numbers of 21 stages" in printed
    for name in damaged:
        assert str(tmp_path / name) in printed and str(tmp_path / name) in missing
    assert "every planned stage is finished" not in text


def test_what_is_no_working_directory_is_left_as_it_is(tmp_path):
    for folder in (tmp_path / "empty", tmp_path / "run"):
        folder.mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    for folder in (tmp_path / "empty", tmp_path / "run", tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="WORKDIR/ENCODER/STAGE"):
            build.main(build.Config(folder))
        assert sorted(tmp_path.rglob("*")) == before


def test_what_was_left_out_is_said(tmp_path):
    row = Row("overlap_risk", 0.5, 0.4, 0.6, 7, n_excluded=2, excluded="two copies")
    unreadable = {f"{i}.png": "truncated" for i in range(5)}
    folder = tmp_path / "net" / "overlap"
    folder.mkdir(parents=True)
    Summary("evaluate", "", {}, (row,), unreadable).write(folder)
    text = page.render(
        page.Page(
            "", "", "", [page.Section("n", "", list(build._numbers(collect.collect(tmp_path))))]
        )
    )
    assert "Left out of overlap_risk: two copies" in text and "<button>n_excluded</button>" in text
    assert "net/overlap: 5 unreadable images were left out: 0.png (truncated), 1.png" in text


def _shown(row):
    """The page with a table of one encoder, and another that has no number."""
    column = METRICS["universal_quantile"].columns[0]
    compared = Compared("s", "universal_quantile", column, "", "low", {"a": row})
    section = page.Section("s", "S", [page.comparison_table(["a", "b"], [compared], [None])])
    return page.render(page.Page("title", "heading", ("summary",), [section]))


def test_numbers_near_zero_keep_their_digits():
    row = Row("universal_quantile", 0.00042, 0.0, 1.0, 3)
    text = _shown(row)
    assert "0.00042<small>0.000 to 1.000" in text and "missing" in text
    assert f'title="{METRICS["universal_quantile"].definition}"' in text
    text = _shown(Row("universal_quantile", float("inf"), float("nan"), float("nan"), 3))
    assert "no finite value" in text
    text = _shown(Row("universal_quantile", 0.5, 0.4, 0.6, 3, n_excluded=2, excluded="it moved"))
    assert "<small>n = 3 of 5</small>" in text and "left out: it moved" in text


def test_curves_share_panels_and_each_encoder_looks_the_same(workdir, tmp_path):
    found = collect.collect(workdir)
    curves, problems = figures.gather(found)
    assert not problems
    assert list(curves)[:3] == ["distance-eps-0.05", "distance-eps-0.1", "margin-ratio"]
    assert list(curves["distance-eps-0.1"]) == ["untargeted, eps 0.1", "targeted, eps 0.1"]
    for panel in curves["distance-eps-0.1"].values():
        assert list(panel) == ["middle", "strong", "weak"]
    made = lambda kind, value: Curve(
        "f", "p", "x", "y", "", np.arange(3.0), np.asarray(value), kind=kind
    )
    figure = figures.draw({"p": {"b": made("line", [0, 1, 2])}}, ("a", "b"))
    [line] = figure.axes[0].lines
    assert line.get_color() == figures._COLORS[1] and figure.axes[0].get_ylim()[0] == 0
    figure = figures.draw({"p": {"b": made("line", [-1, 1, 2])}}, ("a", "b"))
    assert figure.axes[0].get_ylim()[0] < -1
    # A dollar sign is one; what cannot be drawn is spelled out.
    named = {name: made("step", [0, 0.5, 1]) for name in ("$a$", "b_$", "caf\udce9\n", "x" * 99)}
    figure = figures.draw({"p": named}, tuple(named))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("$a$", "b_$", "caf\\udce9\\n", "x" * 39 + "…")
    ]
    assert "$a$" in figures.to_svg(figure)
    endless = Curve("f", "p", "x", "y", "", np.array([0, 2, np.inf]), np.arange(3.0), kind="step")
    figure = figures.draw({"p": {"a": made("step", [0, 1, 1]), "b": endless}}, ("a", "b"))
    assert figure.axes[0].get_xlim() == (0, 2.1)
    points = figures.draw({"p": {"a": made("points", [-1, 1, -2])}}, ("a",))
    assert points.axes[0].get_title() == "a\n66.7% below 0"


def test_curves_of_an_unknown_job_are_said_to_be_missing(workdir):
    found = collect.collect(workdir)
    with JOBS.replaced("evaluate", cast(Any, None)):
        _, problems = figures.gather(found)
    assert len(problems) == 15 and all("no job 'evaluate'" in line for line in problems)


def test_drawing_changes_nothing_of_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    settings: Any = matplotlib.rcParams
    before = {name: settings[name] for name in figures.STYLE}
    curve = Curve("f", "p", "x", "y", "", np.arange(2.0), np.arange(2.0))
    figures.to_svg(figures.draw({"p": {"a": curve}}, ("a",)))
    assert {name: settings[name] for name in figures.STYLE} == before
