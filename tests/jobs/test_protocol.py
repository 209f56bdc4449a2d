"""Every job keeps the same promises: killed and resumed, damaged, changed, moved, divided.

A job that is added stands in `SETTINGS` with tiny settings, and is tested like the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import tiny_encoder

from ur_jax import runs
from ur_jax.certify import CenterConfig
from ur_jax.data import ViewConfig, open_images
from ur_jax.errors import UserError
from ur_jax.jobs import JOBS, Job, Session
from ur_jax.jobs.certify import Certify
from ur_jax.jobs.impersonate import Impersonate, ImpersonationConfig
from ur_jax.jobs.knn import Knn
from ur_jax.jobs.label_free import EvaluationConfig, LabelFree
from ur_jax.jobs.probe import Probe
from ur_jax.jobs.progress import quiet
from ur_jax.jobs.train import Train
from ur_jax.metrics import METRICS
from ur_jax.probes.linear import ProbeConfig
from ur_jax.runs import Summary, files, folder
from ur_jax.training import MocoV2Config

TRAINING = ProbeConfig(num_epochs=2, learning_rate=0.1, batch_size=8, batch_norm=True)
SETTINGS = {
    "evaluate": lambda at: LabelFree(
        protocol=EvaluationConfig(
            num_images=10, eps=(0.05,), read_at=(1, 2), overlap_steps=1, breakaway_steps=1,
            num_distribution=None, batch_size=8,
        )
    ),
    "certify": lambda at: Certify(
        num_images=3,
        config=CenterConfig(bound="union", n0=300, n=512, alpha1=0.05, alpha2=0.05, delta=0.15),
    ),
    "probe": lambda at: Probe(
        test_images=f"folder:{at / 'images'}", cached=True, training=TRAINING,
        views=ViewConfig(augment=False),
    ),
    "impersonate": lambda at: Impersonate(
        probe=str(at / "probe" / "probe"),
        attack=ImpersonationConfig(read_at=(1, 2), batch_size=8),
    ),
    "knn": lambda at: Knn(test_images=f"folder:{at / 'images'}", k=3, batch_size=8),
    "train": lambda at: Train(
        batch_size=8, num_epochs=2, view_size=8,
        method=MocoV2Config(group_size=4, queue_size=16),
    ),
}  # fmt: skip
CHANGES = {
    "evaluate": lambda job: {"protocol": dataclasses.replace(job.protocol, seed=1)},
    "certify": lambda job: {"seed": 1},
    "probe": lambda job: {"seed": 1},
    "impersonate": lambda job: {"attack": dataclasses.replace(job.attack, seed=1)},
    "knn": lambda job: {"k": 4},
    "train": lambda job: {"seed": 1},
}

pytestmark = pytest.mark.filterwarnings("ignore")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with an encoder, two dozen images of two classes, and a probe."""
    place = tmp_path_factory.mktemp("protocol")
    tiny_encoder.save_images(place / "images", 24)
    with tiny_encoder.stands_for_demo():
        tiny_encoder.save(place / "encoder")
        make("probe", place).run(place / "probe", progress=quiet)
    return place


@pytest.fixture(autouse=True)
def stands_for_demo(monkeypatch):
    monkeypatch.setattr(Job, "doubt", lambda self: ())  # it has tests of its own, and takes seconds
    with tiny_encoder.stands_for_demo():
        yield


def make(name, at, **changes):
    shared = {"images": f"folder:{at / 'images'}"}
    if name != "train":  # whose encoder is the name of a network
        shared["encoder"] = str(at / "encoder")
    return dataclasses.replace(SETTINGS[name](at), **(shared | changes))


def results(out):
    """The bytes of what a run reports."""
    names = [path.name for path in out.glob("*.parquet") if path.stem != "times"]
    return {name: (out / name).read_bytes() for name in (*sorted(names), "summary.json")}


@pytest.fixture(scope="module")
def whole(at):
    """The runs of all jobs that nothing disturbed, {name: folder}."""
    found = {}
    with tiny_encoder.stands_for_demo():
        for name in SETTINGS:
            found[name] = at / "whole" / name
            make(name, at).run(found[name], progress=quiet, plots=False)
    return found


def test_every_job_is_held_to_it():
    assert set(JOBS) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_at_its_files_and_resumed_it_ends_with_the_same_bytes(
    name, at, whole, tmp_path, monkeypatch
):
    write = files.atomic_path
    for survived in (1, 1, 2, 3, 5, None):  # files that a session writes before it dies
        left = itertools.count(-1 if survived is None else survived, -1)

        def write_or_die(path, left=left):
            if path.name != ".lease.json" and next(left) == 0:
                raise Killed
            return write(path)

        for module in (files, folder):
            monkeypatch.setattr(module, "atomic_path", write_or_die)
        if survived is None:
            make(name, at).run(tmp_path / "out", progress=quiet, plots=False)
        elif not (tmp_path / "out" / "summary.json").exists():
            with contextlib.suppress(Killed):
                make(name, at).run(tmp_path / "out", progress=quiet, plots=False)
            assert survived > 1 or not (tmp_path / "out" / "summary.json").exists()
    assert results(tmp_path / "out") == results(whole[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_and_other_files_are_refused_and_nothing_is_lost(name, at, whole, tmp_path):
    before = results(whole[name])
    job = make(name, at)
    with pytest.raises(UserError, match="another configuration"):
        dataclasses.replace(job, **CHANGES[name](job)).run(whole[name], progress=quiet)
    assert results(whole[name]) == before
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="neither"):
        job.run(tmp_path, progress=quiet)
    (tmp_path / "file").write_text("mine")
    with pytest.raises((UserError, OSError)):
        job.run(tmp_path / "file", progress=quiet)
    assert (tmp_path / "letter.txt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_images_elsewhere_are_the_same_job_and_other_pixels_are_not(name, at, tmp_path):
    shutil.copytree(at / "images", tmp_path / "moved")
    identity = make(name, at).opened().identity
    moved = make(name, at, images=f"folder:{tmp_path / 'moved'}").opened().identity
    assert moved == identity
    text = json.dumps(identity, default=files._plain)
    assert str(at) not in text and "/" not in text.replace("\\/", "")
    first = next((tmp_path / "moved").glob("*/*.png"))
    other = next(path for path in (tmp_path / "moved").glob("*/*.png") if path != first)
    first.write_bytes(other.read_bytes())
    assert make(name, at, images=f"folder:{tmp_path / 'moved'}").opened().identity != identity


@pytest.mark.parametrize("name", SETTINGS)
def test_damaged_parts_and_tables_are_set_aside_and_come_out_the_same(name, at, whole, tmp_path):
    shutil.copytree(whole[name], tmp_path / "out")
    rng = np.random.default_rng(0)
    found = sorted((tmp_path / "out" / "parts").glob("*/*.npz"))
    for path in found[:: max(1, len(found) // 3)]:
        content = bytearray(path.read_bytes())
        path.write_bytes(content[: rng.integers(len(content))])
    (tmp_path / "out" / "summary.json").write_text("{")
    make(name, at).run(tmp_path / "out", progress=quiet, plots=False)
    assert results(tmp_path / "out") == results(whole[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_notebook_gets(name, at):
    """Live objects instead of names; a typed result that prints, and is a frame."""
    job = make(name, at).opened()
    summary = job.run(progress=quiet)
    assert summary.job == name and bool(summary.rows) == (name != "train")
    assert len(summary.to_dataframe()) == len(summary.rows) == summary.to_arrow().num_rows
    assert all(len(line) <= 100 for line in str(summary).splitlines()) and len(repr(summary)) < 400
    assert job.samples > 0


@pytest.mark.parametrize("name", ["evaluate", "certify", "knn"])
def test_divided_over_hosts_and_another_number_goes_on(name, at, whole, tmp_path):
    # Two of the jobs wait for all hosts between stages: two processes do that in test_hosts.
    job = make(name, at).opened()
    run = runs.open_run(tmp_path, job.identity)
    for host, num_hosts in ((1, 2), (0, 3), (0, 1)):
        job.compute(Session(run, host=host, num_hosts=num_hosts))
    job.merge(Session(run)).write(tmp_path)
    assert results(tmp_path) == results(whole[name])


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("knn", "train")])
def test_values_of_images_are_what_the_numbers_sum_up(name, whole):
    summary = Summary.read(whole[name] / "summary.json")
    rows = {(row.metric, *row.setting): row for row in summary.rows}
    found = list(JOBS[name].values(whole[name], summary, {}))
    assert found
    for values in found:
        row = rows[values.metric, *(getattr(values, field) for field in runs.SETTINGS)]
        defined = values.value[~np.isnan(values.value)]
        summed = np.median if METRICS[values.metric].statistic == "median" else np.mean
        assert len(values.index) == len(values.value) == row.n + row.n_excluded
        assert summed(defined) == pytest.approx(row.value, rel=1e-6)


def test_images_may_be_live(at):
    source = open_images(f"folder:{at / 'images'}")
    assert make("knn", at, images=source).opened().source() is source
