"""Cards and leaderboards: the numbers as they are, and only what is comparable side by side."""

from __future__ import annotations

import json
import re

import pytest
import simulated

from ur_jax import cli
from ur_jax.errors import UserError
from ur_jax.report import card, collect, leaderboard
from ur_jax.runs import Summary


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two working directories of one encoder each, and one of both."""
    found = []
    for name, encoders in (("ours", ("strong",)), ("theirs", ("weak", "strong"))):
        folder = tmp_path_factory.mktemp("work") / name
        simulated.make(folder, encoders, 40, 6, 30, 50, pictures=False)
        found.append(folder)
    return found


def test_a_card_has_the_numbers(places, tmp_path, capsys):
    folder, out = places[0] / "strong", tmp_path / "card.md"
    assert cli.main(["card", str(folder), "--out", str(out), "--name", "our net"]) == 0
    text = out.read_text()
    head, index, section = re.split(r"^---$", text, flags=re.M, maxsplit=2)
    row = next(
        row
        for row in Summary.read(folder / "attacks-0.05" / "summary.json").rows
        if (row.metric, row.divergence, row.step) == ("universal_quantile", "l2", 5)
    )
    assert not head and 'name: "our net"' in index and f"value: {json.dumps(row.value)}" in index
    assert f"| universal quantile, eps 0.05, step 5 | {row.value:.3f} |" in section
    # What hubs read: a task, a data set and metrics of each result.
    for result in index.split("  - task:")[1:]:
        assert {"type:", "dataset:", "metrics:", "value:"} <= set(result.split())
    assert cli.main(["card", str(folder), "--out", str(out)]) == 2  # nothing is overwritten
    with pytest.raises(UserError, match="several encoders"):
        card.summaries(places[1])
    with pytest.raises(UserError, match="no results"):
        card.summaries(tmp_path)


def test_a_board_of_two_places(places, tmp_path):
    out = tmp_path / "board"
    assert cli.main(["leaderboard", *map(str, places), "--out", str(out)]) == 0
    text = (out / "leaderboard.html").read_text()
    labels = ["strong (ours)", "strong (theirs)", "weak"]
    assert all(f"<button>{label}</button>" in text for label in labels)
    found, left_out = leaderboard.merge(places)
    assert not left_out and leaderboard._encoders(found) == labels
    each = [len(collect.collect(place).numbers) for place in places]
    assert len(found.numbers) == sum(each)
    assert len((out / "leaderboard.csv").read_text().splitlines()) == 1 + sum(each)


def test_what_is_not_comparable_is_left_out_in_words(places, tmp_path, capsys):
    other = tmp_path / "other"
    simulated.make(other, ("weak",), 40, 6, 30, 50, pictures=False)
    folder = other / "weak" / "attacks-0.05"
    summary = Summary.read(folder / "summary.json")
    changed = dict(summary.identity) | {"images": "another hash"}
    Summary(summary.job, summary.title, changed, summary.rows).write(folder)
    out = tmp_path / "board"
    assert cli.main(["leaderboard", str(places[0]), str(other), "--out", str(out)]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "weak/attacks-0.05 of" in told and "other images, 'another hash' and not None" in told
    found, _ = leaderboard.merge([places[0], other])
    assert ("weak", "attacks-0.05") not in found.summaries
    assert ("weak", "attacks-0.1") in found.summaries
    assert cli.main(["leaderboard", str(tmp_path)]) == 2
