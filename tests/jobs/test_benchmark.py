"""The plan: skipped, changed, failed and blocked stages; the benchmark's stages and flags."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex

import benchmark
import command
import fsspec
import jax
import numpy as np
import pytest
import tiny_encoder
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from ur_jax import data, runs
from ur_jax.encoders import loading
from ur_jax.jobs import label_free
from ur_jax.performance import ahead
from ur_jax.runs import plan


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
        runs.write_json(folder / "summary.json", {"settings": settings})

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
    states = run(tmp_path, make(probe=1))
    assert states == {"probe": "finished", "accuracy": "finished", "overlap": "skipped"}
    assert not (tmp_path / "net" / "probe" / "old").exists()
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
        make_stage(tmp_path, calls, "pets", missing="It needs images."),
        make_stage(tmp_path, calls, "overlap"),
    ]
    states = run(tmp_path, stages)
    assert states == {
        "probe": "failed", "accuracy": "blocked", "pets": "blocked", "overlap": "finished",
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
            runs.open_run(pathlib.Path(path), {})


def test_speed_is_that_of_stages_in_one_session(tmp_path):
    runs.write_json(tmp_path / "net" / "plan.json", {})
    for name, sessions, device in (("a", 1, "x"), ("b", 1, "x"), ("c", 2, "x"), ("d", 1, "y")):
        record = {"finished": True, "work": 100.0, "seconds": 10.0, "sessions": sessions}
        record |= {"device": device, "hosts": 1}
        runs.write_json(tmp_path / "net" / f"{name}.json", record)
    assert plan.speed(tmp_path, "x") == 10.0 and plan.speed(tmp_path, "z") is None


@pytest.fixture
def tiny():
    """Encoder "demo" with a network of a few hundred weights."""
    with tiny_encoder.stands_for_demo():
        yield


@pytest.fixture
def config(tmp_path, tiny):
    """Of a tiny encoder on two dozen images."""
    tiny_encoder.save_images(tmp_path / "images", 24)
    tiny_encoder.save(tmp_path / "run" / "encoder")
    return dataclasses.replace(
        benchmark.PRESETS["cifar"],
        workdir=tmp_path / "work",
        encoders=(str(tmp_path / "run" / "encoder"), f"gone={tmp_path}/nowhere"),
        images=f"folder:{tmp_path / 'images'}",
        protocol=label_free.EvaluationConfig(
            num_images=6, eps=(0.05, 0.1), read_at=(1, 2), overlap_steps=1, breakaway_steps=2,
            num_distribution=None, batch_size=8,
        ),
    )  # fmt: skip


def test_the_matrix_and_what_each_setting_changes(config):
    whole = benchmark.make_plan(config)
    names = {key.partition("/")[2] for key in whole.stages}
    assert len(whole.stages) == 2 * len(names) == 22
    assert {key.partition("/")[0] for key in whole.stages} == {"run", "gone"}
    assert "nowhere" in whole.stages["gone/overlap"].missing
    assert "--train-images" in whole.stages["run/probe-noisy"].missing
    # 6 images, two modes, 3 steps of 3 passes and the clean one.
    assert whole.stages["run/attacks-0.05"].samples == 6 * (2 * 9 + 1)
    assert whole.stages["run/overlap"].work > 0

    def changed(**changes):
        other = benchmark.make_plan(dataclasses.replace(config, **changes))
        prints = [p._fingerprints for p in (whole, other)]
        return {k.partition("/")[2] for k in prints[0] if prints[0][k] != prints[1].get(k)}

    replace = dataclasses.replace
    assert changed(protocol=replace(config.protocol, overlap_steps=2)) == {"overlap"}
    assert changed(num_workers=2, only=("run/overlap",)) == set()
    certificates = replace(
        config.certificates, center=replace(config.certificates.center, n=20_000)
    )
    assert changed(certificates=certificates) == {"certified-divergence"}
    assert changed(protocol=replace(config.protocol, seed=1)) == {
        "distances", "attacks-0.05", "attacks-0.1", "overlap", "breakaway",
    }  # fmt: skip
    # A probe is a setting of what it is used for.
    assert changed(probe=replace(config.probe, num_draws=3)) == {
        "probe-noisy",
        "certified-accuracy",
    }
    assert changed(probe=replace(config.probe, num_images=9)) == {
        "probe-standard", "probe-noisy", "probe-low_pass", "certified-accuracy", "impersonation",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_runs_what_it_can_and_shares_clean_representations(config, monkeypatch):
    passes = []
    encode = label_free._encode
    monkeypatch.setattr(label_free, "_encode", lambda *a: passes.append(1) or encode(*a))
    only = ("*/distances", "*/breakaway")
    assert benchmark.main(dataclasses.replace(config, only=only, dry_run=True)) == 0
    assert not config.workdir.exists()
    assert benchmark.main(dataclasses.replace(config, only=only)) == 1  # one encoder is missing
    # 24 images in 3 batches once for both, and the batch of attacked ones.
    assert len(passes) == 3 + 1
    # The batch of attacked images has two rows of padding, which the gallery leaves out.
    gallery = np.load(config.workdir / "run/breakaway/parts/gallery/000000.npz")
    assert len(set(gallery["index"])) == len(gallery["index"]) == 6
    table = (config.workdir / "RESULTS.csv").read_bytes()
    text = (config.workdir / "report.html").read_text()
    assert "nowhere" in text and "median_clean_distance" in text
    passes.clear()
    again = dataclasses.replace(config, only=only, encoders=config.encoders[:1])
    assert benchmark.main(again) == 0 and not passes
    assert (config.workdir / "RESULTS.csv").read_bytes() == table
    planned = json.loads((config.workdir / "run" / "plan.json").read_text())
    assert "overlap" in planned["stages"] and (config.workdir / "gone" / "plan.json").exists()
    words = shlex.split(planned["command"])[2:]
    parsed = command.parse(benchmark.Config, benchmark.PRESETS, words)
    assert parsed == dataclasses.replace(config, encoders=config.encoders[:1])


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder where gs:// lies in this test."""

    class Buckets(DirFileSystem):
        protocol = ("gs", "gcs")

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("gs://").removeprefix("gcs://").rstrip("/")

    files = Buckets(path=str(tmp_path / "buckets"), fs=LocalFileSystem(auto_mkdir=True))
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: files)
    return tmp_path / "buckets"


@pytest.mark.filterwarnings("ignore")
def test_results_in_a_bucket_are_those_in_a_folder(config, bucket):
    config = dataclasses.replace(config, encoders=config.encoders[:1], only=("*/breakaway",))
    words = ["--workdir", "gs://mine/runs/work"]
    parsed = command.parse(benchmark.Config, benchmark.PRESETS, words)
    there = dataclasses.replace(config, workdir=parsed.workdir)
    assert benchmark.main(config) == benchmark.main(there) == 0
    found = {p.relative_to(config.workdir) for p in config.workdir.rglob("*") if p.is_file()}
    work = bucket / "mine" / "runs" / "work"
    assert found == {p.relative_to(work) for p in work.rglob("*") if p.is_file()}
    table = (config.workdir / "RESULTS.csv").read_bytes()
    assert (work / "RESULTS.csv").read_bytes() == table
    # What is there is skipped; without its end, a stage goes on from its parts.
    record = work / "run" / "breakaway.json"
    first = record.read_bytes()
    assert benchmark.main(there) == 0 and record.read_bytes() == first
    (work / "run" / "breakaway" / "summary.json").unlink()
    part = work / "run" / "breakaway" / "parts" / "breakaway" / "000000.npz"
    written = part.stat().st_mtime_ns
    assert benchmark.main(there) == 0 and part.stat().st_mtime_ns == written
    # Other settings: what was there is removed.
    protocol = dataclasses.replace(config.protocol, seed=1)
    assert benchmark.main(dataclasses.replace(there, protocol=protocol)) == 0
    assert part.stat().st_mtime_ns != written
    assert json.loads(record.read_text())["sessions"] == 1
    assert (work / "RESULTS.csv").read_bytes() != table


@pytest.mark.parametrize(
    "text, label",
    [
        ("demo", "demo"),
        ("mine=runs/mine/encoder", "mine"),
        ("runs/mine/encoder", "mine"),
        ("checkpoints/mocov2.ckpt/", "mocov2.ckpt"),
    ],
)
def test_labels_of_encoders(text, label):
    assert benchmark.label_of(text) == label


def test_parts_are_divided_over_hosts_and_another_number_goes_on(config, tmp_path):
    encoder = loading.load_encoder(config.encoders[0])
    source = data.open_images(config.images)
    found = {}
    for name, schedule in (("one", [(0, 1)]), ("two", [(1, 2), (0, 3), (0, 1)])):
        opened = runs.open_run(tmp_path / name, {})
        for host, num_hosts in schedule:
            label_free.compute(
                encoder, source, opened, config=config.protocol, stages=("overlap", "distances"),
                host=host, num_hosts=num_hosts,
            )  # fmt: skip
            if (host, num_hosts) == (1, 2):
                kept = {path.stem for path in (opened.path / "parts" / "clean").iterdir()}
                assert kept == {"000001"}
        found[name] = label_free.merge(
            opened, config=config.protocol, stages=("overlap", "distances")
        )
    one, two = ({m[:4]: m.estimate.value for m in r.measurements} for r in found.values())
    assert one == two and len(one) == 3 + 6
    quantiles = runs.read_table(tmp_path / "two" / "distances.parquet")
    middle = quantiles["dist_l2"][quantiles["level"] == 0.5]
    np.testing.assert_allclose(middle, one["median_clean_distance", "l2", None, None], rtol=1e-6)
    with pytest.raises(ValueError, match="Unknown stage 'overlpa'"):
        label_free.merge(opened, config=config.protocol, stages=("overlpa",))


def test_shapes_of_an_encoder_are_those_of_its_weights(config):
    real = loading.load_encoder(config.encoders[0])
    abstract = loading.abstract_encoder("demo")
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    with pytest.raises(ValueError, match="Unknown encoder"):
        loading.abstract_encoder("demmo")


def test_collectives_inside_loops_are_told_from_those_outside():
    program = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %g = f32[8] all-gather(%p), dimensions={0}
}

%body.1 (c: (f32[8])) -> (f32[8]) {
  %r = f32[8] all-reduce-start(%x), to_apply=%add
  %f = f32[8] fusion(%r), kind=kLoop, calls=%fused
}

%condition.2 (c: (f32[8])) -> pred[] {
  ROOT %p = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.3 (x: f32[8]) -> f32[8] {
  %w = (f32[8]) while(%t), condition=%condition.2, body=%body.1
  ROOT %q = f32[8] collective-permute(%y), source_target_pairs={{0,1}}
}
"""
    inner, outer = ahead.collectives(program)
    assert inner == {"all-reduce": 1, "all-gather": 1} and outer == {"collective-permute": 1}
    # The same of a real program: a psum in each turn, and one at the end.
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def loop(x):
        turn = lambda _, y: jax.lax.psum(y, "data") * 0.5
        return jax.lax.fori_loop(0, 3, turn, x)

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(np.ones(8, np.float32)).compile().as_text()
    assert ahead.collectives(text) == ({"all-reduce": 1}, {})


def test_presets_parse():
    words = ["--workdir", "w", "--preset", "cifar", "--protocol.eps", "0.2", "--only", "a/b", "c/*"]
    config = command.parse(benchmark.Config, benchmark.PRESETS, words)
    assert config.protocol.eps == (0.2,) and config.only == ("a/b", "c/*")
    paper = benchmark.PRESETS["paper"]
    assert paper.certificates.center.n == 100_000 and paper.impersonation.eps == 0.1
    assert benchmark.duration(59) == "59 s" and benchmark.duration(7200) == "2.0 h"
