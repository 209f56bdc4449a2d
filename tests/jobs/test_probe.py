"""The probe's job: what it learns and reports, its two trainings, bad images."""

from __future__ import annotations

import dataclasses
import pathlib

import interrupted
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ur_jax import runs
from ur_jax.data import ViewConfig
from ur_jax.encoders import from_fn
from ur_jax.jobs import probe_training
from ur_jax.jobs.base import Session
from ur_jax.jobs.probe import Probe
from ur_jax.jobs.progress import quiet
from ur_jax.probes.checkpoint import load_probe, restore_probe
from ur_jax.probes.linear import ProbeConfig

SIZE = (8, 8)
COLOURS = {"blue": 2, "green": 1, "red": 0}


def mean_colour(params, images):
    """Twice the mean of each channel, and a fourth feature that says nothing."""
    return jnp.concatenate([images.mean((1, 2)), images[:, 0, 0, :1]], axis=1) * params


ENCODER = from_fn(mean_colour, jnp.full(4, 2.0), input_size=SIZE, name="tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven noisy images of each of three colours."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, channel in COLOURS.items():
        (folder / name).mkdir()
        for i in range(7):
            pixels = rng.integers(0, 120, (*SIZE, 3))
            pixels[..., channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


@pytest.fixture
def job(photos):
    """Three epochs by eight."""
    training = ProbeConfig(num_epochs=3, learning_rate=1.0, milestones=(2,), batch_size=8)
    return Probe(encoder=ENCODER, images=photos, test_images=photos, training=training)


def train(job, path, **session):
    """The training alone."""
    job = job.opened()
    return probe_training.train(job, Session(runs.open_run(path, job.identity), **session))


@pytest.mark.parametrize("kind, augment, num_draws", [("low_pass", False, 1), ("noisy", True, 3)])
def test_cached_features_train_the_same_probe(job, tmp_path, kind, augment, num_draws):
    """Where nothing is random; and with as many draws as epochs."""
    job = dataclasses.replace(job, views=ViewConfig(kind, radius=40.0, augment=augment))
    streaming = train(job, tmp_path / "streaming")
    cached = dataclasses.replace(job, cached=True, num_draws=num_draws)
    trained, history = train(cached, tmp_path / "cached")
    for name, values in streaming[0].items():
        np.testing.assert_allclose(trained[name], values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        [row["loss"] for row in history], [row["loss"] for row in streaming[1]], rtol=1e-4
    )
    if kind == "noisy":  # one draw is another training
        fewer, _ = train(dataclasses.replace(cached, num_draws=1), tmp_path / "fewer")
        assert np.abs(fewer["kernel"] - trained["kernel"]).max() > 1e-3
    else:  # on one device as on eight
        mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
        alone, _ = train(cached, tmp_path / "alone", mesh=mesh)
        np.testing.assert_allclose(alone["kernel"], trained["kernel"], rtol=1e-4, atol=1e-5)


# Amid training, again, and amid testing.
@pytest.mark.parametrize("cached, stops", [(False, (5, 11, 3)), (True, (5, 4, 2))])
def test_killed_and_resumed_it_is_the_same_probe_bit_for_bit(job, photos, tmp_path, cached, stops):
    training = ProbeConfig(
        num_epochs=4, learning_rate=1.0, milestones=(3,), batch_size=8, batch_norm=True
    )
    job = dataclasses.replace(
        job,
        cached=cached,
        num_draws=2 if cached else 1,
        views=ViewConfig("noisy", sigma=0.1),
        training=training,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    summary = job.run(whole, progress=quiet)
    for count in stops:
        with pytest.raises(KeyboardInterrupt):
            job.run(killed, progress=interrupted.stop_after(count))
    job.run(killed, progress=quiet)
    for name in ("summary.json", "predictions.parquet"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    (trained, known), (same, _) = (restore_probe(p / "probe", ENCODER) for p in (killed, whole))
    jax.tree.map(np.testing.assert_array_equal, trained, same)
    assert known["class_names"] == ["blue", "green", "red"] and known["kind"] == "noisy"

    # Three colours are separable: all right, on clean images and noisy ones.
    assert len(summary.details["history"]) == 4 and not summary.unreadable
    found = {(row.metric, row.images): row for row in summary.rows}
    assert len(found) == 4
    for row in found.values():
        assert (row.value, row.n) == (1.0, 21)
        assert row.low == pytest.approx(0.025 ** (1 / 21))  # Clopper-Pearson of 21 of 21
    rows = pq.read_table(whole / "predictions.parquet").to_pylist()
    assert [row["images"] for row in rows] == ["noisy"] * 21 + ["standard"] * 21
    assert rows[8]["name"] == "green/1.png" and rows[8]["label"] == rows[8]["predicted"] == 1
    last, said = Probe.remarks(summary)
    assert last.startswith("Last epoch: loss 0.") and "training accuracy 100.00%" in last
    assert "21 of 21 test images are among the training images" in said


def test_test_images_that_are_training_images_by_any_name_are_counted(job, photos, tmp_path):
    folder = pathlib.Path(photos.removeprefix("folder:"))
    for number, ours in enumerate(COLOURS):
        (tmp_path / "test" / ours).mkdir(parents=True)
        known = (folder / ours / "0.png").read_bytes()
        (tmp_path / "test" / ours / "renamed.png").write_bytes(known)
        other = Image.new("RGB", SIZE, (40 * number, 200, 9))
        other.save(tmp_path / "test" / ours / "other.png")
    job = dataclasses.replace(job, test_images=f"folder:{tmp_path / 'test'}", cached=True)
    summary = job.run(progress=quiet)
    assert any("3 of 6 test images are among the training" in r for r in job.remarks(summary))
    fewer = dataclasses.replace(job, num_images=2).run(progress=quiet)  # the first, and the last
    assert any("1 of 6 test images are among" in remark for remark in job.remarks(fewer))


@pytest.mark.filterwarnings("ignore:.*It now lies at")
def test_a_damaged_state_of_the_training_is_set_aside_and_computed_again(job, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    job.run(whole, progress=quiet, plots=False)
    with pytest.raises(KeyboardInterrupt):
        job.run(out, progress=interrupted.stop_after(7))  # after two epochs of three steps
    files = [path for path in (out / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-3])
    job.run(out, progress=quiet, plots=False)
    for name in ("summary.json", "predictions.parquet"):
        assert (whole / name).read_bytes() == (out / name).read_bytes()
    assert [path.name for path in (out / "damaged").iterdir()] == ["state"]


@pytest.mark.filterwarnings("ignore:.*It now lies at")
def test_a_damaged_probe_is_set_aside_and_trained_again(job, tmp_path):
    job, out = dataclasses.replace(job, cached=True), tmp_path / "out"
    job.run(out, progress=quiet, plots=False)
    names = ("summary.json", "predictions.parquet")
    before = [(out / name).read_bytes() for name in names]
    for number in range(12):
        files = sorted(path for path in (out / "probe").rglob("*") if path.is_file())
        path = files[number % len(files)]
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        if number % 3 == 0:
            path.unlink()
        job.run(out, progress=quiet, plots=False)
        assert [(out / name).read_bytes() for name in names] == before, path
    found = list((out / "damaged").iterdir())
    assert len(found) >= 3 and all(path.name.startswith("probe") for path in found)
    load_probe(out / "probe", ENCODER)


def test_test_images_of_some_classes_in_another_order_under_other_names(job, photos, tmp_path):
    folder = pathlib.Path(photos.removeprefix("folder:"))
    for ours, theirs in (("red", "crimson"), ("blue", "Blue")):
        (tmp_path / "some" / theirs).mkdir(parents=True)
        for path in (folder / ours).iterdir():
            (tmp_path / "some" / theirs / path.name).write_bytes(path.read_bytes())
    job = dataclasses.replace(job, test_images=f"folder:{tmp_path / 'some'}", cached=True)
    with pytest.raises(ValueError, match="class of the training images 'crimson'.*THEIRS=OURS"):
        job.run(tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists()  # said before anything was encoded
    mapped = dataclasses.replace(job, class_map=("crimson=red",))
    summary = mapped.run(tmp_path / "out", progress=quiet)
    assert [(row.metric, row.value, row.n) for row in summary.rows][0] == (
        "top_1_accuracy",
        1.0,
        14,
    )
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert {(row["name"].split("/")[0], row["label"]) for row in rows} == {
        ("Blue", 0),
        ("crimson", 2),
    }
    assert any("14 of 14 test images are among" in said for said in Probe.remarks(summary))
    assert load_probe(tmp_path / "out" / "probe", ENCODER).class_names == ("blue", "green", "red")


def test_bad_settings_and_images_are_named_before_the_folder_is_made(
    job, photos, tmp_path, monkeypatch
):
    folder = pathlib.Path(photos.removeprefix("folder:"))
    loose = tmp_path / "loose"
    for name in ("a/0.png", "b/0.png", "9.png"):
        (loose / name).parent.mkdir(parents=True, exist_ok=True)
        (loose / name).write_bytes((folder / "red" / "0.png").read_bytes())
    for change, message in (
        ({"images": f"folder:{loose}"}, "none with 9.png"),
        ({"test_images": f"folder:{loose}", "class_map": ("a=red", "b=blue")}, "none with 9.png"),
        ({"images": f"folder:{folder / 'red'}"}, "at least 2 classes"),
        ({"num_images": 0}, "num_images >= 1, or none, got 0"),
        ({"num_test_images": -1}, "num_test_images >= 1, or none, got -1"),
        ({"num_images": 22}, "22 samples of a listing of 21"),
        ({"num_draws": 0, "cached": True}, "num_draws >= 1, got 0"),
        ({"num_draws": 2}, "num_draws=2 with cached=True"),
        ({"training": ProbeConfig(batch_size=12)}, "divisible by 8"),
        ({"class_map": ("red",)}, "THEIRS=OURS, got 'red'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(job, **change).run(tmp_path / "out", progress=quiet)
        assert not (tmp_path / "out").exists(), change
    monkeypatch.setattr(Probe, "doubt", lambda self: ())  # which finds both at once
    for weight, message in (
        (0.0, "are collapsed: 21 images"),
        (np.inf, "features of 21 images were"),
    ):
        broken = ENCODER.replace(params=jnp.full(4, weight))
        for cached in (True, False)[: 1 if weight == 0 else 2]:
            changed = dataclasses.replace(job, encoder=broken, cached=cached)
            with pytest.raises(ValueError, match=message):
                changed.run(progress=quiet)
    wild = dataclasses.replace(job, training=ProbeConfig(learning_rate=1e38, batch_size=8))
    with pytest.raises(ValueError, match="loss is (nan|inf) in epoch .* 1e\\+38"):
        wild.run(progress=quiet)
