"""The plan: skipped, changed, failed and blocked stages; nothing is deleted."""

from __future__ import annotations

import dataclasses
import errno
import pathlib

import pytest

from ur_jax.runs import files, folder, plan


@pytest.fixture
def calls():
    return []


def make_stage(workdir, calls, name, settings=0, error=None, **more):
    """A stage that notes that it ran and writes a summary."""
    folder = workdir / "net" / name

    def run():
        calls.append(name)
        if error is not None:
            raise error
        files.write_json(folder / "summary.json", {"settings": settings})

    return plan.Stage("net", name, settings, run, **more)


def run(workdir, stages, only=()):
    whole = plan.Plan(workdir, stages)
    outcomes = whole.run(whole.select(only), on_begin=lambda stage: None)
    return {outcome.key.removeprefix("net/"): outcome.state for outcome in outcomes}


def test_finished_stages_are_skipped_and_changed_ones_computed_again(tmp_path, calls):
    make = lambda probe=0, width=0: [
        make_stage(tmp_path, calls, "probe", probe),
        make_stage(tmp_path, calls, "accuracy", requires=("probe",)),
        make_stage(tmp_path, calls, "overlap", width),
    ]
    assert set(run(tmp_path, make()).values()) == {"finished"}
    assert set(run(tmp_path, make()).values()) == {"skipped"}
    assert calls == ["probe", "accuracy", "overlap"]
    record = plan.read_record(tmp_path / "net" / "probe")
    assert record["sessions"] == 1 and record["hosts"] == 1 and record["seconds"] >= 0

    # What a stage needs counts as its own setting.
    (tmp_path / "net" / "probe" / "old").touch()
    calls.clear()
    whole = plan.Plan(tmp_path, make(probe=1))
    place = whole.set_aside(whole.stages["net/probe"])
    states = run(tmp_path, make(probe=1))
    assert states == {"probe": "finished", "accuracy": "finished", "overlap": "skipped"}
    assert not (tmp_path / "net" / "probe" / "old").exists()
    # Nothing is deleted: what was there lies where the plan said.
    assert place.parent == tmp_path / "net" / "probe.old"
    assert {path.name for path in place.iterdir()} == {"old", "record.json", "summary.json"}
    # A lost summary, and another setting.
    calls.clear()
    (tmp_path / "net" / "accuracy" / "summary.json").unlink()
    whole = plan.Plan(tmp_path, make(probe=1, width=1))
    states = [whole.state(stage) for stage in whole.stages.values()]
    assert states == ["finished", "begun", "changed"]
    run(tmp_path, make(probe=1, width=1), only=["*/overlap"])
    assert calls == ["overlap"]


def test_a_failure_stays_where_it_happened(tmp_path, calls):
    broken = make_stage(tmp_path, calls, "probe", error=OSError("disk full"))
    stages = [
        broken,
        make_stage(tmp_path, calls, "accuracy", requires=("probe",)),
        make_stage(tmp_path, calls, "pets", missing="It cannot be loaded."),
        make_stage(tmp_path, calls, "more", left_out="It needs images."),
        make_stage(tmp_path, calls, "overlap"),
    ]
    states = run(tmp_path, stages)
    assert states == {
        "probe": "failed", "accuracy": "blocked", "pets": "blocked", "more": "left out",
        "overlap": "finished",
    }  # fmt: skip
    record = plan.read_record(tmp_path / "net" / "probe")
    assert "OSError: disk full" in record["error"] and not record["finished"]
    stages[0] = make_stage(tmp_path, calls, "probe")
    assert run(tmp_path, stages)["accuracy"] == "finished"
    record = plan.read_record(tmp_path / "net" / "probe")
    assert record["sessions"] == 2 and "error" not in record


def test_killed_stage_goes_on(tmp_path, calls):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [make_stage(tmp_path, calls, "overlap", error=KeyboardInterrupt())])
    part = tmp_path / "net" / "overlap" / "part"
    part.parent.mkdir()
    part.touch()
    assert run(tmp_path, [make_stage(tmp_path, calls, "overlap")]) == {"overlap": "finished"}
    assert part.exists()  # resumed, not begun anew


def test_a_plan_refuses_what_cannot_be_meant(tmp_path, calls):
    stage = make_stage(tmp_path, calls, "overlap")
    with pytest.raises(ValueError, match="two; name encoders apart"):
        plan.Plan(tmp_path, [stage, stage])
    with pytest.raises(ValueError, match="Expected net/probe before net/overlap"):
        plan.Plan(tmp_path, [dataclasses.replace(stage, requires=("probe",))])
    with pytest.raises(ValueError, match="'net/overlpa', which fits none of: net/overlap"):
        plan.Plan(tmp_path, [stage]).select(["net/overlpa"])


def test_a_bucket_that_lost_a_slash_is_refused():
    for path in ("gs://bucket/runs", "s3://bucket"):
        with pytest.raises(ValueError, match="gs://BUCKET/FOLDER, got '(gs|s3):/bucket"):
            plan.Plan(pathlib.Path(path), [])
        with pytest.raises(ValueError, match="drops a slash"):
            folder.open_run(pathlib.Path(path), {})


def test_speed_is_that_of_stages_in_one_session(tmp_path):
    files.write_json(tmp_path / "net" / "plan.json", {})
    for name, sessions, device in (("a", 1, "x"), ("b", 1, "x"), ("c", 2, "x"), ("d", 1, "y")):
        record = {
            "fingerprint": "",
            "finished": True,
            "work": 100.0,
            "seconds": 10.0,
            "sessions": sessions,
        }
        record |= {"device": device, "hosts": 1}
        files.write_json(tmp_path / "net" / f"{name}.json", record)
    assert plan.speed(tmp_path, "x") == 10.0 and plan.speed(tmp_path, "z") is None


def test_a_damaged_record_or_summary_loses_nothing(tmp_path, calls):
    make = lambda settings=0: [make_stage(tmp_path, calls, "overlap", settings)]
    run(tmp_path, make())
    (tmp_path / "net" / "overlap.json").write_text("{")
    with pytest.warns(match="overlap.json is damaged"):
        assert run(tmp_path, make()) == {"overlap": "finished"}
    (tmp_path / "net" / "overlap" / "summary.json").write_text('{"settings": 0, "sha256": "0"}')
    with pytest.warns(match="summary.json is damaged.*merged again"):
        assert run(tmp_path, make()) == {"overlap": "finished"}
    assert calls == ["overlap"] * 3


def test_without_a_record_the_folder_says_whose_it_is(tmp_path, calls):
    def claim(settings):
        def run():
            opened = folder.open_run(tmp_path / "net" / "overlap", {"settings": settings})
            files.write_json(opened.path / "summary.json", {"settings": settings})

        return [plan.Stage("net", "overlap", {"settings": settings}, run)]

    run(tmp_path, claim(0))
    (tmp_path / "net" / "overlap.json").unlink()
    assert run(tmp_path, claim(1)) == {"overlap": "finished"}
    older = list((tmp_path / "net" / "overlap.old").glob("*/summary.json"))
    assert [files.read_json(path)["settings"] for path in older] == [0]
    assert files.read_json(tmp_path / "net" / "overlap" / "summary.json") == {"settings": 1}


def test_a_full_disk_stops_the_plan_and_a_failure_does_not(tmp_path):
    """Nor does what asks the process to stop count as a failure of the stage."""
    begun = []

    def stage(name, error=None):
        def run():
            begun.append(name)
            if error is not None:
                raise error

        return plan.Stage("net", name, {}, run)

    full = OSError(errno.ENOSPC, "full", "a")
    stages = [stage("a", ValueError("a")), stage("b", full), stage("c")]
    whole = plan.Plan(tmp_path, stages)
    with pytest.raises(OSError, match="full"):
        whole.run(stages, lambda stage: None)
    assert begun == ["a", "b"]
    assert "full" in whole.record(stages[1])["error"] and not whole.record(stages[2])
    stopped = [stage("d", KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        plan.Plan(tmp_path, stopped).run(stopped, lambda stage: None)
