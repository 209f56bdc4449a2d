"""The batch job on a tiny encoder: both methods, killed and resumed, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ur_jax
from ur_jax import data, runs
from ur_jax.certify import CenterConfig, RandomizedConfig, eps_out_from_counts, lower_bound
from ur_jax.encoders import checkpoints, from_fn
from ur_jax.jobs import certify as certification
from ur_jax.runs import folder

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
CENTER = CenterConfig(bound="union", n0=300, n=1000, alpha1=0.05, alpha2=0.05, delta=0.15)
RANDOMIZED = RandomizedConfig(bound="union", n=1000, alpha=0.01)


def flatten_and_multiply(params, images):
    return images.reshape(images.shape[0], -1) @ params


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def script(monkeypatch):
    """The script, with a linear encoder for every path and a row written as soon as it is there."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    sys.modules.pop("certify", None)
    import certify

    weight = np.random.default_rng(0).standard_normal((48, 6)).astype(np.float32) / 7
    encoder = from_fn(flatten_and_multiply, weight, input_size=(4, 4))
    monkeypatch.setattr(ur_jax, "load_encoder", lambda *args, **kwargs: encoder)
    monkeypatch.setattr(certification, "_FLUSH_SECONDS", -1.0)
    return certify


@pytest.fixture
def photos(tmp_path):
    """Nine small images in two classes, one of them unreadable."""
    rng = np.random.default_rng(1)
    for i in range(8):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "photos" / "a" / "broken.png").write_bytes(b"not an image")
    return f"folder:{tmp_path / 'photos'}"


@pytest.fixture
def make_config(script, photos, tmp_path):
    def make(method, out, **changes):
        config = script.Config(
            encoder="tiny",
            images=photos,
            out=tmp_path / out,
            method=method,
            num_images=9,
            probe="nearest",
            batch_size=16,
            center=CENTER,
            randomized=RANDOMIZED,
        )
        return dataclasses.replace(config, **changes)

    return make


def run_killed(script, config, monkeypatch, every=1):
    """Runs to the end, dying at every second file that it writes."""
    whole, deaths = folder.atomic_path, 0
    for _ in range(100):
        left = itertools.count(every, -1)

        def write_or_die(path, left=left):
            if next(left) == 0:
                raise Killed
            return whole(path)

        monkeypatch.setattr(folder, "atomic_path", write_or_die)
        try:
            script.main(config)
        except Killed:
            deaths += 1
        else:
            monkeypatch.setattr(folder, "atomic_path", whole)
            return deaths
        every += 0 if deaths < 5 else 100
    raise AssertionError("never finished")


@pytest.mark.parametrize("method", ["center", "randomized"])
@pytest.mark.filterwarnings("ignore:.*broken")
def test_killed_and_resumed_gives_the_same_table(script, make_config, monkeypatch, method):
    alone, killed = make_config(method, "alone"), make_config(method, "killed")
    script.main(alone)
    assert run_killed(script, killed, monkeypatch) == 5
    for name in ("certificates.parquet", "summary.json"):
        assert (alone.out / name).read_bytes() == (killed.out / name).read_bytes()
    rows = pq.read_table(alone.out / "certificates.parquet").to_pylist()
    assert [row["index"] for row in rows] == [i for i in range(9) if "broken" not in name_of(i)]
    assert (alone.out / "curves.png").stat().st_size > 1000
    summary = json.loads((alone.out / "summary.json").read_text())
    assert len(summary["unreadable"]) == 1
    assert summary["samples"] == sum(row["num_drawn"] for row in rows)
    (certified,) = (m for m in summary["metrics"] if m["metric"] == "certified" and not m["radius"])
    assert certified["n"] == 8
    # A certificate follows from its row alone, also at another alpha.
    for row in rows:
        if row["abstained"]:
            continue
        if method == "center":
            pair = np.array(row["distances"], np.float32), np.array(row["counts"])
            assert eps_out_from_counts(*pair, row["n"], config=CENTER) >= row["eps_out"]
            strict = dataclasses.replace(CENTER, alpha2=0.01)
            assert eps_out_from_counts(*pair, row["n"], config=strict) >= row["eps_out"]
            assert 0 < row["quantile"] <= 1 and row["normalised"] > 0
        else:
            assert lower_bound(row["count"], row["n"], RANDOMIZED) == row["lower"]
    times = pq.read_table(alone.out / "times.parquet").to_pylist()
    assert [row["index"] for row in times] == [row["index"] for row in rows]


def name_of(index):
    """The listing: class a is 0, 2, 4, 6 and broken; class b is 1, 3, 5, 7."""
    return ["0", "2", "4", "6", "broken", "1", "3", "5", "7"][index]


@pytest.mark.filterwarnings("ignore:.*broken")
def test_another_number_of_hosts_goes_on(script, photos, tmp_path):
    def job(out):
        run = runs.open_run(tmp_path / out, {})
        source = data.open_images(photos)
        return certification.Job(ur_jax.load_encoder(), source, np.arange(9), run, RANDOMIZED)

    alone, resumed, seen = job("alone"), job("resumed"), []
    alone.certify(batch_size=16)
    resumed.certify(host=1, num_hosts=2, batch_size=16, on_progress=seen.append)
    assert (seen[-1].num_images, seen[-1].num_done, seen[-1].seconds_left) == (4, 4, 0)
    resumed.certify(batch_size=16, on_progress=seen.append)
    assert seen[-1].num_images == 9 and seen[-1].num_done == 8  # one is unreadable
    assert alone.finish() == resumed.finish()
    one, two = ((j.run.path / "certificates.parquet").read_bytes() for j in (alone, resumed))
    assert one == two


@pytest.mark.filterwarnings("ignore:.*broken")
def test_a_probe_of_the_dataset(script, make_config, tmp_path):
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal((6, 2)).astype(np.float32)
    probe = {"kernel": kernel, "bias": np.zeros(2, np.float32)}
    metadata = {"encoder": "tiny", "config": {}}
    checkpoints.save_encoder(tmp_path / "probe", probe, metadata)
    config = make_config("randomized", "out", probe=str(tmp_path / "probe"))
    script.main(config)
    rows = pq.read_table(config.out / "certificates.parquet").to_pylist()
    assert {row["label"] for row in rows} == {0, 1}
    summary = json.loads((config.out / "summary.json").read_text())
    correct = [row["predicted"] == row["label"] and not row["abstained"] for row in rows]
    metrics = {(m["metric"], m["radius"]): m for m in summary["metrics"]}
    assert metrics["certified_accuracy", 0.0]["value"] == np.mean(correct)
    radius = np.array([row["radius"] for row in rows])
    np.testing.assert_allclose(
        metrics["average_certified_radius", None]["value"], np.mean(radius * correct)
    )

    # Another configuration does not mix with these results.
    with pytest.raises(ValueError, match="another configuration"):
        script.main(dataclasses.replace(config, seed=1))
    # One class only, but the images have two.
    small = {"kernel": kernel[:5], "bias": np.zeros(2, np.float32)}
    checkpoints.save_encoder(tmp_path / "small", small, metadata)
    with pytest.raises(ValueError, match=r"kernel \[6, K\]"):
        script.main(make_config("randomized", "small_out", probe=str(tmp_path / "small")))
    with pytest.raises(ValueError, match="Expected --probe"):
        script.main(make_config("randomized", "no_probe", probe=None))
    with pytest.raises(ValueError, match="batch_size >= 1"):
        script.main(make_config("center", "no_batch", batch_size=0))


def test_outputs_that_are_not_finite_name_the_image(script, make_config, monkeypatch):
    encoder = from_fn(nan_where_bright, jnp.ones(3), input_size=(4, 4))
    monkeypatch.setattr(ur_jax, "load_encoder", lambda *args, **kwargs: encoder)
    probe = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    monkeypatch.setattr(certification, "load_probe", lambda *args: probe)
    config = make_config("randomized", "nan", probe="given", num_images=2)
    bright = pathlib.Path(config.images.removeprefix("folder:")) / "a" / "0.png"
    Image.fromarray(np.full((4, 4, 3), 250, np.uint8)).save(bright)
    with pytest.warns(UserWarning, match="0.png: .* not certified"):
        script.main(config)
    rows = pq.read_table(config.out / "certificates.parquet").to_pylist()
    assert [row["abstained"] for row in rows][0] and rows[0]["num_bad"] > 0


def nan_where_bright(params, images):
    return jnp.where(images.mean((1, 2, 3))[:, None] > 0.7, jnp.nan, 1.0) * params


def test_presets_and_flags(script):
    import command

    base = ["--encoder", "demo", "--images", "demo", "--out", "x"]
    paper = command.parse(script.Config, script.PRESETS, [*base, "--preset", "paper"])
    assert paper.center.bound == "hoeffding" and paper.center.n == 100_000
    assert paper.randomized.bound == "exact" and paper.num_images == 200
    flags = [*base, "--method", "randomized", "--randomized.radii", "0.1", "0.25", "--seed", "3"]
    adaptive = command.parse(script.Config, script.PRESETS, flags)
    assert adaptive.randomized.bound == "union" and adaptive.randomized.radii == (0.1, 0.25)
