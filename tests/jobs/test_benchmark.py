"""The benchmark: its stages, its flags, what it shares, where it writes."""

from __future__ import annotations

import dataclasses
import json
import shlex

import fsspec
import jax
import numpy as np
import pytest
import tiny_encoder
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from ur_jax import cli
from ur_jax.encoders import loading
from ur_jax.errors import UserError
from ur_jax.jobs import base, benchmark, parts
from ur_jax.jobs.label_free import EvaluationConfig
from ur_jax.jobs.matrix import EncoderEntry, make_plan
from ur_jax.report import build


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
        protocol=EvaluationConfig(
            num_images=6, eps=(0.05, 0.1), read_at=(1, 2), overlap_steps=1, breakaway_steps=2,
            num_distribution=None, batch_size=8,
        ),
    )  # fmt: skip


def test_the_matrix_and_what_each_setting_changes(config):
    whole = make_plan(config)
    names = {key.partition("/")[2] for key in whole.stages}
    assert len(whole.stages) == 2 * len(names) == 24
    assert {key.partition("/")[0] for key in whole.stages} == {"run", "gone"}
    assert "nowhere" in whole.stages["gone/overlap"].missing
    assert "--train-images" in whole.stages["run/probe-noisy"].left_out
    # 6 images, two modes, 3 steps of 3 passes and the clean one.
    assert whole.stages["run/attacks-0.05"].samples == 6 * (2 * 9 + 1)
    assert whole.stages["run/overlap"].work > 0

    def changed(**changes):
        other = make_plan(dataclasses.replace(config, **changes))
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
        "distances", "attacks-0.05", "attacks-0.1", "overlap", "breakaway", "strongest-0.05",
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
    encode = parts.encode
    monkeypatch.setattr(parts, "encode", lambda *a: passes.append(1) or encode(*a))
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
    parsed = cli.parse(cli.find("benchmark"), words)
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
def test_results_in_a_bucket_are_those_in_a_folder(config, bucket, monkeypatch):
    config = dataclasses.replace(config, encoders=config.encoders[:1], only=("*/breakaway",))
    words = ["--workdir", "gs://mine/runs/work"]
    parsed = cli.parse(cli.find("benchmark"), words)
    there = dataclasses.replace(config, workdir=parsed.workdir)
    assert benchmark.main(config) == benchmark.main(there) == 0
    found = {p.relative_to(config.workdir) for p in config.workdir.rglob("*") if p.is_file()}
    work = bucket / "mine" / "runs" / "work"
    assert found == {p.relative_to(work) for p in work.rglob("*") if p.is_file()}
    table = (config.workdir / "RESULTS.csv").read_bytes()
    assert (work / "RESULTS.csv").read_bytes() == table
    # What is there is skipped; without its end, a stage goes on from its parts. (The page again
    # would take half of the time.)
    monkeypatch.setattr(build, "make_page", lambda _: None)
    monkeypatch.setattr(build.page, "render", lambda _: "")
    monkeypatch.setattr(base, "_draw", lambda *_: None)
    record = work / "run" / "breakaway.json"
    first = record.read_bytes()
    assert benchmark.main(there) == 0 and record.read_bytes() == first
    (work / "run" / "breakaway" / "summary.json").unlink()
    part = work / "run" / "breakaway" / "parts" / "breakaway" / "000000.npz"
    written = part.stat().st_mtime_ns
    assert benchmark.main(there) == 0 and part.stat().st_mtime_ns == written
    # Other settings: what was there is set aside.
    protocol = dataclasses.replace(config.protocol, seed=1)
    assert benchmark.main(dataclasses.replace(there, protocol=protocol)) == 0
    assert part.stat().st_mtime_ns != written
    older = list((work / "run" / "breakaway.old").glob("*/parts/breakaway/000000.npz"))
    assert [path.stat().st_mtime_ns for path in older] == [written] or len(older) == 1
    assert json.loads(record.read_text())["sessions"] == 1
    assert (work / "RESULTS.csv").read_bytes() != table


@pytest.mark.parametrize(
    "text, label",
    [
        ("demo", "demo"),
        ("mine=runs/mine/encoder", "mine"),
        ("runs/mine/encoder", "mine"),
        ("checkpoints/mocov2.ckpt/", "mocov2.ckpt"),
        ("networks/wide.py:make", "wide"),
        ("package.networks:make", "networks"),
        ("networks/wide.py:make,width=64", "wide"),
        ("mine=networks/wide.py:make,width=64", "mine"),
    ],
)
def test_labels_of_encoders(text, label):
    assert EncoderEntry.of(text).label == label


@pytest.mark.parametrize("label", ["a/b", "..", ".hidden", "a b", ""])
def test_a_label_that_cannot_be_a_folder_is_refused(label):
    with pytest.raises(UserError, match="mine="):
        EncoderEntry.of(f"{label}=demo" if label else "/=demo")


def test_shapes_of_an_encoder_are_those_of_its_weights(config):
    real = loading.load_encoder(config.encoders[0])
    abstract = loading.abstract_encoder("demo")
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    shapes = lambda encoder: [(x.shape, x.dtype) for x in jax.tree.leaves(encoder)]
    assert shapes(real) == shapes(abstract)
    with pytest.raises(ValueError, match="Unknown encoder"):
        loading.abstract_encoder("demmo")


def test_presets_parse():
    words = ["--workdir", "w", "--preset", "cifar", "--protocol.eps", "0.2", "--only", "a/b", "c/*"]
    config = cli.parse(cli.find("benchmark"), words)
    assert config.protocol.eps == (0.2,) and config.only == ("a/b", "c/*")
    paper = benchmark.PRESETS["paper"]
    assert paper.certificates.center.n == 100_000 and paper.impersonation.eps == 0.1
    assert benchmark.duration(59) == "59 s" and benchmark.duration(7200) == "2.0 h"
