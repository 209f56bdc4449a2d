"""The throughput measurement: PyTorch's twins compute the same, turns, shares, budget, files."""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoder

from ur_jax import performance, runs
from ur_jax.errors import UserError
from ur_jax.performance import command as script
from ur_jax.performance import history, suite, sweeps, timing, work


def test_workloads_are_timed_by_turns():
    order = []

    def workload(name, seconds):
        run = lambda: (order.append(name), time.sleep(seconds))
        return timing.Workload(name, run, items=1, compile_seconds=0.0)

    first, second = timing.time_by_turns([workload("a", 0.001), workload("b", 0.03)], repeats=3)
    assert order == list("abababab")
    assert first.wall.shape == (3,) and (second.wall >= 0.03).all() and second.warmup >= 0.03
    assert (second.processor < 0.03).all()  # sleeping costs none
    with pytest.raises(ValueError, match="repeats"):
        timing.time_by_turns([], repeats=0)


def test_rates_ratios_and_shares_follow_from_the_times(monkeypatch):
    size = work.Size("demo", "float32", 8, 1, 1, 1, 1)
    workloads = [
        timing.Workload("ur_jax", None, 8, 1.0, flops=100.0, bytes_moved=50.0),
        timing.Workload("other", None, 8, 1.0),
    ]
    times = [
        timing.Times(9.0, np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0])),
        timing.Times(9.0, np.array([2.0, 8.0, 8.0]), np.array([2.0, 2.0, 2.0])),
    ]
    peaks = timing.Peaks({"float32": 500.0}, 100.0)
    ours, other = suite._results("forward", size, workloads, times, peaks)
    assert (ours.rate, ours.low, ours.high, ours.ratio) == (4.0, 2.0, 8.0, 1.0)
    assert (ours.flops_share, ours.bandwidth_share, ours.bytes_per_item) == (0.1, 0.25, 6.25)
    assert (other.rate, other.ratio, other.per_processor_second) == (1.0, 2.0, 4.0)
    assert other.flops_share is None


def test_the_script_writes_a_table_that_can_be_shown_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "device_peaks", lambda dtypes: timing.Peaks({"float32": 1e9}, 1e9))
    config = script.Config(out=tmp_path / "run", preset="toy", works=("center",), batch_sizes=(8,))
    script.main(config)
    written = json.loads((tmp_path / "run" / "throughput.json").read_text())
    assert [r["work"] for r in written["results"]] == ["center"]
    assert written["left_out"] == [] and written["peak_flops"] == {"float32": 1e9}
    elsewhere = script.Config(out=tmp_path / "other", results=tmp_path / "run" / "throughput.json")
    script.main(elsewhere)
    assert (tmp_path / "other" / "throughput.png").stat().st_size > 1000
    assert "center" in capsys.readouterr().out


def test_a_measurement_is_recorded_and_shown_in_the_history(tmp_path, monkeypatch, capsys):
    path = tmp_path / "history.jsonl"
    monkeypatch.setattr(history, "PATH", path)
    monkeypatch.setenv("COLUMNS", "200")
    case = ("forward", "resnet50", "float32", 8)
    rest = (1.0, 1.0, 0.5, 0.1, 0.1, None, None, None)
    ours = suite.Result(*case, work.NAME, "images/s", 123.456789, *rest, 6.25e7, 1.0, "")
    other = suite.Result(*case, "torch", "images/s", 100.0, *rest, None, 1.2345678, "")
    versions = {"jax": "0.0.1", "torch": "9.9"}
    context = {"date": "2000-01-01", "device": "abacus", "num_devices": 3, "versions": versions}
    measured = tmp_path / "throughput.json"
    runs.write_json(measured, {**context, "left_out": [], "results": [ours, other]})
    for note in ("idle", "not\nidle"):
        script.main(script.Config(out=tmp_path, results=measured, record=note))
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["note"], second["note"], first["results"]) == (
        "idle", "not idle", second["results"]
    )  # fmt: skip
    assert [r["rate"] for r in first["results"]] == [123.46, 100.0]
    capsys.readouterr()
    script.main(script.Config(history=True))
    shown = capsys.readouterr().out
    for text in ("3 x abacus", "jax 0.0.1, torch 9.9", "123.5 images/s", "62.5", "1.23 torch"):
        assert shown.count(text) == 2
    with pytest.raises(UserError, match="what else the machine was doing as --record, got ' '"):
        script.main(script.Config(record=" "))
    with open(path, "a") as file:
        file.write('{"date": 1}\n')
    with pytest.raises(UserError, match="line 3 is no measurement.*Take that line out"):
        script.main(script.Config(history=True))


def test_an_installed_package_records_nothing_in_itself(tmp_path, monkeypatch):
    path = tmp_path / "site-packages" / "ur_jax" / "performance" / "history.jsonl"
    monkeypatch.setattr(history, "PATH", path)
    with pytest.raises(UserError, match="--record in a checkout"):
        script.main(script.Config(out=tmp_path, record="nothing else running"))
    assert not path.exists()


def test_what_is_recorded_in_the_tree_can_be_shown():
    lines = history.read()
    assert lines and all(line["note"] for line in lines)


def test_training_is_measured_on_a_network_of_its_own_head():
    size = work.Size("demo", "float32", 8, 1, 1, 1, 1)
    with tiny_encoder.stands_for_demo():
        workload = work.WORKS["training"].make(size)
    first = int(workload.run())
    assert int(workload.run()) == first + 1  # steps of one training, each on the state before
    assert workload.items == 8 and workload.compile_seconds > 0


def test_kernels_are_counted_where_the_compilers_analysis_says_nothing(monkeypatch):
    def thrice(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ x), x)

    program = jax.jit(thrice).lower(np.ones((64, 64), np.float32)).compile()
    once = 2 * 64**3 * jax.local_device_count()
    assert work.program_cost(program)[0] == pytest.approx(once, rel=0.05)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert work.program_cost(program)[0] == 3 * once


def test_a_rehearsal_has_all_that_a_gpu_is_asked_for_in_little():
    small = sweeps.rehearsal(performance.PRESETS["gpu"])
    of = lambda sweeps: {(w, d) for s in sweeps for w in s.works for d in s.dtypes}
    assert of(small) == of(performance.PRESETS["gpu"])
    sizes = [size for sweep in small for work, size in sweep.cases() if work == "u_pgd"]
    assert max(size.batch_size * size.num_steps for size in sizes) == 2 * jax.local_device_count()
    assert {size.encoder for size in sizes} == {"resnet50", "mocov3"}


def test_no_case_begins_after_the_budget(monkeypatch):
    monkeypatch.setattr(suite, "device_peaks", lambda dtypes: timing.Peaks({"float32": 1e9}, 1e9))
    results, context = performance.run([performance.Sweep(batch_sizes=(8,))], budget=-1.0)
    assert results == [] and len(context["left_out"]) == 3


def test_what_is_compiled_ahead_in_threads_gives_the_same_cases(monkeypatch):
    monkeypatch.setattr(suite, "device_peaks", lambda dtypes: timing.Peaks({"float32": 1e9}, 1e9))
    sweep = performance.Sweep(
        works=("forward", "distances", "center"),
        encoders=("demo",),
        num_center=16,
        num_rows=16,
        repeats=1,
    )
    made = []
    for name, kind in work.WORKS.items():
        make = lambda size, name=name, kind=kind: made.append(name) or kind.make(size)
        monkeypatch.setitem(work.WORKS, name, kind._replace(make=make))
    results, context = performance.run([sweep, sweep], compile_threads=2)
    assert context["left_out"] == []
    assert [r.work for r in results] == 2 * list(sweep.works)
    assert sorted(made[:2]) == ["center", "forward"]  # before the first case, once
    assert made.count("distances") == 2
    for threads in (0, 10**6):
        with pytest.raises(UserError, match=f"compile_threads >= 1 and at most .* got {threads}"):
            performance.run([sweep], compile_threads=threads)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"works": ("u_pdg",)}, "u_pgd"),
        ({"encoders": ("resnet51",)}, "resnet50"),
        ({"dtypes": ("float16",)}, "float32"),
        ({"batch_sizes": (0,)}, "batch size >= 1, got 0"),
        ({"repeats": 0}, "repeats >= 1, got 0"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        performance.Sweep(**settings)
