"""The table of a working directory: every number, whatever is damaged."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np
import pytest
import simulated

from ur_jax import runs
from ur_jax.report import collect
from ur_jax.runs import Row, Summary


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two encoders with few images."""
    folder = tmp_path_factory.mktemp("work")
    simulated.make(folder, ("strong", "weak"), 40, 6, 30, 50, pictures=False)
    return folder


def test_the_table_has_every_number_and_the_same_bytes(workdir, tmp_path):
    found = collect.collect(workdir)
    assert len(found.summaries) == 22 and repr(found) == "Results(22 stages, 0 damaged)"
    assert len(found.numbers) == sum(len(s.rows) for s in found.summaries.values())
    for name in ("a", "b"):
        collect.write_csv(tmp_path / name, collect.collect(workdir).numbers)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with open(tmp_path / "a", newline="") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == collect.COLUMNS and len(read) == len(found.numbers)
    for line, number in zip(read, found.numbers):
        row = number.row
        assert float(line["value"]) == row.value and int(line["n"]) == row.n
        assert line["low"] == "" if row.low != row.low else float(line["low"]) == row.low
        assert line["radius"] == ("" if row.radius is None else str(row.radius))
    keys = [tuple(line[name] for name in collect.COLUMNS[1:9]) for line in read]
    assert len(set(keys)) == len(keys)


def test_rows_of_both_schemas_become_the_same_lines(tmp_path):
    settings = {"divergence": "l2", "eps": 0.05, "step": 5, "radius": None, "images": None}
    number: dict[str, Any] = {"metric": "relative_quantile", "n": 7, **settings}
    number |= {"value": 0.5, "low": 0.25, "high": 0.75}
    infinite: dict[str, Any] = {**number, "value": None, "low": None, "high": None}
    identity = {"weights_sha256": "ab" * 32, "protocol": {}, "seed": 0}
    older = {"schema": 2, "commit": "c", "device": "1 x cpu", "versions": {}, "unreadable": ["a"]}
    older |= {"config": identity | {"probe": "runs/probe"}, "metrics": [number, infinite]}
    runs.write_json(tmp_path / "net" / "older" / "summary.json", older)
    rows = [Row(**number), Row(**{**infinite, "value": float("-inf")})]
    newer = Summary("evaluate", "", identity, tuple(rows))
    (tmp_path / "net" / "newer").mkdir()
    newer.write(tmp_path / "net" / "newer")
    found = collect.collect(tmp_path)
    assert {s.job for s in found.summaries.values()} == {"evaluate"}
    assert found.summaries["net", "older"].unreadable == {"a": ""}
    first, second, *same = [number.cells() for number in found.numbers]
    assert first["schema"] == 3 and same[0]["schema"] == 2 and first["weights"] == "ab" * 8
    differing = ("schema", "stage", "low", "high")
    ours = lambda line: {k: v for k, v in line.items() if k not in differing}
    assert [ours(line) for line in same] == [ours(first), ours(second)]
    # Robust is high: what has no finite value is the worst, not the best.
    assert second["value"] == float("-inf")


def _odd_summaries():
    """JSON that is almost a summary."""
    row = {"metric": "overlap_risk", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    good = {"schema": 3, "job": "evaluate", "title": "", "identity": {}, "rows": [row]}
    for change in (
        *({"identity": []}, {"job": 3}, {"provenance": None}, {"unreadable": []}, {"rows": None}),
        *({"rows": [row | {name: value}]} for name, value in (
            ("n", "9"), ("n", True), ("value", "much"), ("eps", "0.05"), ("metric", 5), ("step", [])
        )),
    ):  # fmt: skip
        yield json.dumps(good | change)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"schema": 3, "ro', "summary.json"),
        ('{"schema": 1, "metrics": {}}', "schema 2 or 3, got 1"),
        ('{"schema": 3}', "no summary of a job"),
        *((text, "no summary of a job") for text in _odd_summaries()),
        ("[]", "no summary of a job"),
        ("", "summary.json"),
    ],
)
def test_a_damaged_or_older_summary_is_named_and_the_others_are_read(
    text, message, workdir, tmp_path
):
    path = tmp_path / "net" / "half" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    good = (workdir / "weak" / "overlap" / "summary.json").read_bytes()
    (tmp_path / "net" / "overlap").mkdir()
    (tmp_path / "net" / "overlap" / "summary.json").write_bytes(good)
    here = collect.collect(tmp_path)
    assert set(here.summaries) == {("net", "overlap")} and len(here.numbers) == 2
    [reason] = here.damaged.values()
    assert message in reason and str(path) in reason and "\n" not in reason


def test_a_flipped_byte_never_changes_a_number(workdir, tmp_path):
    whole = (workdir / "weak" / "attacks-0.05" / "summary.json").read_bytes()
    path = tmp_path / "net" / "attacks" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(whole)
    cells = lambda: [number.cells() for number in collect.collect(tmp_path).numbers]
    expected, rng = repr(cells()), np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(flipped[:place] if place % 4 == 0 else flipped))
        found = collect.collect(tmp_path)
        assert found.damaged or repr(cells()) == expected
        assert all(str(path) in reason for reason in found.damaged.values())


def test_what_is_no_working_directory_is_refused_in_one_line(workdir, tmp_path):
    one_run = workdir / "weak" / "overlap"
    for folder, message in (
        (tmp_path / "nowhere", "none at"),
        (tmp_path, "give the --workdir"),
        (one_run, "the folder of one run"),
        (one_run.parent, f"give {workdir}"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            collect.collect(folder)
        assert "\n" not in str(raised.value)


def test_what_is_left_out_is_counted_in_the_table(tmp_path):
    row = Row("overlap_risk", 0.5, 0.1, 0.9, 6, n_excluded=2, excluded="two copies of an image")
    folder = tmp_path / "net" / "overlap"
    folder.mkdir(parents=True)
    Summary("evaluate", "", {}, (row,)).write(folder)
    collect.write_csv(tmp_path / "RESULTS.csv", collect.collect(tmp_path).numbers)
    header, line = (tmp_path / "RESULTS.csv").read_text().splitlines()
    assert dict(zip(header.split(","), line.split(",")))["n_excluded"] == "2"
    assert header.split(",").index("n_excluded") == header.split(",").index("n") + 1
    written = json.loads((folder / "summary.json").read_text())
    assert written["rows"][0]["excluded"] == "two copies of an image"
