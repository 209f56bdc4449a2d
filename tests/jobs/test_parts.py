"""Parts of a stage: what a fault of the storage leaves behind."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from given_images import flat

from ur_jax import data, runs
from ur_jax.data import reading
from ur_jax.jobs import parts
from ur_jax.jobs.base import Session


@pytest.mark.filterwarnings("ignore:Skipped the unreadable")
def test_images_that_go_away_and_come_back_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WAITS", (0.0, 0.0))
    photos, away = tmp_path / "photos", tmp_path / "away"
    (photos / "b").mkdir(parents=True)
    for i in range(12):
        flat(i).save(photos / ("b" if i >= 6 else "") / f"{i:02d}.png")
    (photos / "b" / "13.png").write_text("does not decode")

    def run(name):
        session = Session(runs.open_run(tmp_path / name, {}))
        stage = parts.Stage("clean", "clean", (np.arange(13),), 4)
        arguments = {"input_size": (2, 2), "preparation": "resize"}
        mean = lambda batch: {"mean": batch.images.mean((1, 2, 3))}
        try:
            parts.run_stage(session, stage, source, mean, **arguments)
        finally:
            done = session.run.num_parts("clean")
        return done, session.run.read_parts("clean"), parts.unreadable(session.run)

    source = data.FolderSource(photos)
    expected = run("left alone")
    (photos / "b").rename(away)  # a mount that is gone
    with pytest.raises(data.StorageError, match="b/06.png.*No such file.*is kept"):
        run("interrupted")
    assert runs.open_run(tmp_path / "interrupted", {}).num_parts("clean") == 1
    away.rename(photos / "b")
    done, rows, unreadable = run("interrupted")
    assert done == expected[0] == 4 and unreadable == expected[2]
    assert list(unreadable) == ["b/13.png"] and "format" in unreadable["b/13.png"]
    assert rows.keys() == expected[1].keys() and len(rows["index"]) == 12
    for name, values in rows.items():
        np.testing.assert_array_equal(values, expected[1][name])


@pytest.mark.parametrize("fails_at", [None, 2])
def test_the_next_batch_is_begun_before_one_is_written(fails_at, tmp_path, monkeypatch):
    events, source = [], data.as_source([flat(i) for i in range(4)])
    run = runs.open_run(tmp_path / "run", {})
    written = type(run).write_part
    note = lambda self, stage, number, rows: (
        events.append(f"written {number}"), written(self, stage, number, rows)
    )  # fmt: skip
    monkeypatch.setattr(type(run), "write_part", note)

    def compute(batch):
        number = int(batch.indices[0])
        if number == fails_at:
            raise RuntimeError("no memory")
        events.append(f"begun {number}")
        return {"mean": batch.images.mean((1, 2, 3))}

    stage = parts.Stage("clean", "clean", (np.arange(4),), 1)
    arguments = {"input_size": (2, 2), "preparation": "resize"}
    with contextlib.nullcontext() if fails_at is None else pytest.raises(RuntimeError):
        parts.run_stage(Session(run), stage, source, compute, **arguments)
    expected = ["begun 0", "begun 1", "written 0"]
    if fails_at is None:
        expected += ["begun 2", "written 1", "begun 3", "written 2", "written 3"]
    else:  # what was begun before the failure is kept
        expected += ["written 1"]
    assert events == expected
