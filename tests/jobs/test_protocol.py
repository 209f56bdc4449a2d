"""Every job keeps the same promises: killed and resumed, damaged, changed, moved, divided.

A job that is added stands in `SETTINGS` with tiny settings, and is tested like the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import subprocess
from unittest import mock

import numpy as np
import pytest
import tiny_encoder

from ur_jax import endings, runs
from ur_jax.attacks import RULES
from ur_jax.certify import CenterConfig
from ur_jax.data import ViewConfig, open_images
from ur_jax.errors import UserError
from ur_jax.jobs import JOBS, Job, Session, train
from ur_jax.jobs.attack_certificates import AttackCertificates
from ur_jax.jobs.certify import Certify
from ur_jax.jobs.impersonate import Impersonate, ImpersonationConfig
from ur_jax.jobs.knn import Knn
from ur_jax.jobs.label_free import EvaluationConfig, LabelFree
from ur_jax.jobs.probe import Probe
from ur_jax.jobs.progress import quiet
from ur_jax.jobs.train import Train
from ur_jax.metrics import METRICS, Column, Metric
from ur_jax.probes.linear import ProbeConfig
from ur_jax.registry import import_object
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
    "attack-certificates": lambda at: AttackCertificates(
        num_images=2, num_steps=2, batch_size=1,
        config=CenterConfig(bound="union", n0=100, n=256, alpha1=0.1, alpha2=0.1, delta=0.25),
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
SMALL = {"certify": 16, "attack-certificates": 12, "knn": 20}
"""KB of a disk that the job fills."""
CHANGES = {
    "evaluate": lambda job: {"protocol": dataclasses.replace(job.protocol, seed=1)},
    "certify": lambda job: {"seed": 1},
    "attack-certificates": lambda job: {"seed": 1},
    "probe": lambda job: {"seed": 1},
    "impersonate": lambda job: {"attack": dataclasses.replace(job.attack, seed=1)},
    "knn": lambda job: {"k": 4},
    "train": lambda job: {"seed": 1},
}

pytestmark = pytest.mark.filterwarnings("ignore")


class Killed(Exception):
    pass


@contextlib.contextmanager
def quickly():
    """Checkpoints of a tiny network, and without what has tests of its own and takes seconds."""
    nothing = lambda *_: ()
    with (
        tiny_encoder.stands_for_demo(),
        mock.patch.object(Job, "doubt", nothing),
        mock.patch.object(train, "_draw_samples", nothing),
    ):
        yield


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with an encoder, two dozen images of two classes, and a probe."""
    place = tmp_path_factory.mktemp("protocol")
    tiny_encoder.save_images(place / "images", 24)
    with quickly():
        tiny_encoder.save(place / "encoder")
        make("probe", place).run(place / "probe", progress=quiet)
    return place


@pytest.fixture(autouse=True)
def stands_for_demo():
    with quickly():
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
    with quickly():
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


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, and what gives it other options."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = lambda options: subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True
    )
    if mount("size=48k").returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield place, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "-l", place])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_disk_that_is_read_only_or_full_ends_in_a_line_and_loses_nothing(name, at, whole, disk):
    place, remount = disk
    for options, reason in (
        ("ro", "read-only file system"),
        (f"rw,size={SMALL.get(name, 48)}k", "no space left on device"),
    ):  # fmt: skip
        remount(options)
        with pytest.raises(Exception) as ended:
            make(name, at).run(place / "out", progress=quiet, plots=False)
        end = endings.end_of(ended.value, name)
        assert end is not None and end.status == 2, ended.value
        assert reason in end.line and "\n" not in end.line
    remount("size=8m")
    make(name, at).run(place / "out", progress=quiet, plots=False)
    assert results(place / "out") == results(whole[name])


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "train"])
def test_every_number_tells_how_many_images_it_is_without(name, at, tmp_path):
    shutil.copytree(at / "images", tmp_path / "images")
    for label in ("cat", "dog"):
        (tmp_path / "images" / label / "broken.png").write_bytes(b"no picture")
        if name == "attack-certificates":  # of which an image takes half a second
            for path in sorted((tmp_path / "images" / label).glob("[0-9]*.png"))[2:]:
                path.unlink()
    number = sum(1 for _ in tmp_path.glob("images/*/*.png"))
    images = f"folder:{tmp_path / 'images'}"
    job = make(name, at, images=images)
    if hasattr(job, "test_images"):
        job = dataclasses.replace(job, test_images=images)
    if name == "evaluate":  # all images, and pairs of all
        inner = dataclasses.replace(job.protocol, num_images=number)
        job = dataclasses.replace(job, protocol=inner)
    elif hasattr(job, "num_images"):
        job = dataclasses.replace(job, num_images=number)
    summary = job.run(progress=quiet)
    assert len(summary.unreadable) == 2
    for row in summary.rows:
        halved = row.metric in ("overlap_risk", "adversarial_margin")
        halved |= row.images in ("cat -> dog", "dog -> cat")
        all_of_it = number // 2 if halved else number
        assert row.n + row.n_excluded == all_of_it and row.n_excluded >= 1, row
        assert f"{row.n_excluded} of {all_of_it} could not be read" in row.excluded, row


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
        assert len(values.index) == len(values.value) <= row.n + row.n_excluded
        assert len(defined) == row.n
        assert summed(defined) == pytest.approx(row.value, rel=1e-6)


def test_code_from_outside_is_in_the_identity_of_what_uses_it(at, tmp_path):
    """A step rule of a plugin, and a metric of this job, are other ones once they are edited."""
    sources = {"toy_first": "1  # so", "toy_same": "1", "toy_other": "2"}
    for name, times in sources.items():
        (tmp_path / f"{name}.py").write_text(f"class Rule:\n    times = {times}\n")
    first, same, other = (import_object(f"{tmp_path / name}.py:Rule") for name in sources)
    statistic = lambda name: Metric(name, "low", "One.", columns=(Column("evaluate", "one"),))

    def code(rule="toy-identity", kind="evaluate"):
        job = make(kind, at)
        if kind == "evaluate":
            job = dataclasses.replace(job, protocol=dataclasses.replace(job.protocol, rule=rule))
        return job.opened().identity.get("code", {})

    assert code("fixed") == {}
    try:
        RULES.register("toy-identity", first)
        before = code()
        assert list(before) == ["step rule toy-identity"] and code("fixed") == {}
        with RULES.replaced("toy-identity", same):
            assert code() == before
        with RULES.replaced("toy-identity", other):
            assert code() != before
        METRICS.register("toy-identity-metric", statistic("mean"))
        before = code("fixed")
        assert list(before) == ["metric toy-identity-metric"] and code(kind="knn") == {}
        with METRICS.replaced("toy-identity-metric", statistic("median")):
            assert code("fixed") != before
    finally:
        for registry, name in ((RULES, "toy-identity"), (METRICS, "toy-identity-metric")):
            registry._items.pop(name, None)
            registry._outside.discard(name)


def test_images_may_be_live(at):
    source = open_images(f"folder:{at / 'images'}")
    assert make("knn", at, images=source).opened().source() is source
