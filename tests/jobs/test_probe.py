"""Linear probes: the step against a NumPy twin, the job killed and resumed, the probe on disk."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import interrupted
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ur_jax
from ur_jax import data, devices, runs
from ur_jax.certify import Classifier
from ur_jax.data import ViewConfig
from ur_jax.encoders import checkpoints, from_fn
from ur_jax.jobs import certify as certification
from ur_jax.jobs import probe as probing
from ur_jax.probes import linear
from ur_jax.probes.linear import ProbeConfig

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
SIZE = (8, 8)
COLOURS = {"blue": 2, "green": 1, "red": 0}


def mean_colour(params, images):
    """Twice the mean of each channel, and a fourth feature that says nothing."""
    return jnp.concatenate([images.mean((1, 2)), images[:, 0, 0, :1]], axis=1) * params


@pytest.fixture
def encoder():
    return from_fn(mean_colour, jnp.full(4, 2.0), input_size=SIZE, name="tiny")


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
def script(monkeypatch, encoder):
    """The script, with the tiny encoder for every path."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    sys.modules.pop("probe", None)
    import probe as script

    monkeypatch.setattr(ur_jax, "load_encoder", lambda *args, **kwargs: encoder)
    yield script
    sys.modules.pop("probe", None)


# --- the mathematics ------------------------------------------------------------------------------


def twin(state, features, labels, order, mask, config):
    """All epochs in NumPy, float64: softmax regression by SGD with momentum."""
    params = {k: np.asarray(v, np.float64) for k, v in state.params.items()}
    velocity = {k: np.zeros_like(v) for k, v in params.items()}
    mean, var, losses = np.zeros(features.shape[1]), np.ones(features.shape[1]), []
    for epoch in range(config.num_epochs):
        rate = {0: 2.0, 1: 2.0, 2: 0.2, 3: 0.02}[epoch]
        for rows in (column[kept] for column, kept in zip(order[epoch].T, mask[epoch].T)):
            x = features[rows].astype(np.float64)
            if config.batch_norm:
                m, v = x.mean(0), x.var(0)
                x = (x - m) / np.sqrt(v + 1e-6)
                mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v * len(rows) / (len(rows) - 1)
            logits = x @ params["kernel"] + params["bias"]
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            picked = np.arange(len(rows)), labels[rows]
            losses += list(-np.log(p[picked]))
            p[picked] -= 1
            p /= len(rows)
            for name, grad in (("kernel", x.T @ p), ("bias", p.sum(0))):
                velocity[name] = 0.9 * velocity[name] + grad
                params[name] = params[name] - rate * velocity[name]
    return params, mean, var, np.sum(losses)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_epochs_agree_with_a_numpy_twin(batch_norm):
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((19, 5)) * [1, 2, 3, 1, 1] + 1).astype(np.float32)
    labels = rng.integers(0, 3, 19).astype(np.int32)
    config = ProbeConfig(
        num_epochs=4, learning_rate=2.0, milestones=(2, 3), batch_size=8, batch_norm=batch_norm
    )
    state = linear.init_state(jax.random.key(0), 5, 3)
    assert 0.005 < float(state.params["kernel"].std()) < 0.02
    assert not state.params["bias"].any()
    orders = [linear.epoch_order(19, 8, seed=0, epoch=epoch) for epoch in range(4)]
    for order, mask in orders:
        assert order.shape == (8, 3) and sorted(order[mask]) == list(range(19))
    params, mean, var, loss = twin(state, features, labels, *zip(*orders), config)
    total = 0.0
    for epoch, (order, mask) in enumerate(orders):
        rate = np.float32(config.learning_rate_at(epoch))
        state, sums = linear.train_epoch(state, features, labels, order, mask, rate, config=config)
        assert sums.count == 19
        total += float(sums.loss)
    assert total == pytest.approx(loss, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
                 state.params, params)  # fmt: skip

    # Folded, it is the same function of features that were not normalised.
    folded = linear.finish(state, config=config)
    x = features.astype(np.float64)
    if batch_norm:
        np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(state.var, var, rtol=1e-5)
        x = (x - mean) / np.sqrt(var + 1e-6)
    expected = x @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(
        features @ folded["kernel"] + folded["bias"], expected, rtol=2e-4, atol=1e-4
    )


def test_the_papers_schedule_and_bad_settings():
    rates = [ProbeConfig().learning_rate_at(epoch) for epoch in (0, 14, 15, 19, 20, 24)]
    np.testing.assert_allclose(rates, [30, 30, 3, 3, 0.3, 0.3])
    for change in ({"num_epochs": 0}, {"learning_rate": 0.0}, {"momentum": 1.0}, {"decay": -1.0}):
        with pytest.raises(ValueError, match="Expected"):
            ProbeConfig(**change)
    with pytest.raises(ValueError, match="2 classes"):
        linear.init_state(jax.random.key(0), 3, 1)


def test_ranks_break_ties_as_argmax_and_nan_is_wrong():
    logits = jnp.array([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [1.0, jnp.nan, 0.0]])
    labels = jnp.array([2, 0, 2, 1])
    np.testing.assert_array_equal(linear.label_ranks(logits, labels), [1, 0, 2, 2])


# --- the job --------------------------------------------------------------------------------------


def make_job(encoder, photos, path, **changes):
    source = data.open_images(photos)
    config = ProbeConfig(num_epochs=3, learning_rate=1.0, milestones=(2,), batch_size=8)
    job = probing.Job(encoder, source, np.arange(len(source)), runs.open_run(path, {}), config)
    return dataclasses.replace(job, **changes)


@pytest.mark.parametrize("kind, augment, num_draws", [("low_pass", False, 1), ("noisy", True, 3)])
def test_cached_features_train_the_same_probe(encoder, photos, tmp_path, kind, augment, num_draws):
    """Where nothing is random; and with as many draws as epochs."""
    views = ViewConfig(kind, radius=40.0, augment=augment)
    streaming = make_job(encoder, photos, tmp_path / "streaming", views=views).train()
    cached = make_job(encoder, photos, tmp_path / "cached", views=views, num_draws=num_draws)
    trained, history = cached.train()
    for name, values in streaming[0].items():
        np.testing.assert_allclose(trained[name], values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        [row["loss"] for row in history], [row["loss"] for row in streaming[1]], rtol=1e-4
    )
    if kind == "noisy":  # one draw is another training
        fewer = make_job(encoder, photos, tmp_path / "fewer", views=views, num_draws=1).train()
        assert np.abs(fewer[0]["kernel"] - trained["kernel"]).max() > 1e-3
    else:  # on one device as on eight
        mesh = devices.data_mesh(jax.devices()[:1])
        alone = make_job(
            encoder, photos, tmp_path / "alone", views=views, num_draws=1, mesh=mesh
        ).train()
        np.testing.assert_allclose(alone[0]["kernel"], trained["kernel"], rtol=1e-4, atol=1e-5)


def test_hosts_encode_every_other_batch(encoder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(probing.hosts, "on_all_hosts", lambda value: np.array([value, value]))
    for host, own in ((1, {"000001"}), (0, {"000000", "000001", "000002"})):  # 21 images by 8
        job = make_job(encoder, photos, tmp_path, num_draws=1, host=host, num_hosts=2)
        if host == 1:  # it has nothing to begin with, as the other one's parts are not there
            with pytest.raises(IndexError):
                job.train()
        else:
            job.train()
        assert {path.stem for path in (tmp_path / "parts" / "train_0").iterdir()} == own


# Amid training, again, and amid testing.
@pytest.mark.parametrize("cached, stops", [(False, (5, 11, 3)), (True, (5, 4, 2))])
def test_script_killed_and_resumed(script, encoder, photos, tmp_path, monkeypatch, cached, stops):
    training = ProbeConfig(
        num_epochs=4, learning_rate=1.0, milestones=(3,), batch_size=8, batch_norm=True
    )
    config = script.Config(
        encoder="tiny", images=photos, test_images=photos, out=tmp_path / "whole",
        cached=cached, num_draws=2, views=ViewConfig("noisy", sigma=0.1), training=training,
    )  # fmt: skip
    script.main(config)
    killed = dataclasses.replace(config, out=tmp_path / "killed")
    for count in stops:
        with monkeypatch.context() as patch:
            patch.setattr(script.command, "progress", interrupted.stop_after(count))
            with pytest.raises(KeyboardInterrupt):
                script.main(killed)
    script.main(killed)
    for name in ("summary.json", "predictions.parquet"):
        assert (config.out / name).read_bytes() == (killed.out / name).read_bytes()
    trained, known = probing.restore_probe(killed.out / "probe", encoder)
    jax.tree.map(
        np.testing.assert_array_equal,
        trained, probing.restore_probe(config.out / "probe", encoder)[0],
    )  # fmt: skip
    assert known["class_names"] == ["blue", "green", "red"] and known["kind"] == "noisy"

    # Three colours are separable: all right, on clean images and noisy ones.
    summary = json.loads((config.out / "summary.json").read_text())
    assert len(summary["history"]) == 4 and summary["unreadable"] == {}
    found = {(m["metric"], m["images"]): m for m in summary["metrics"]}
    assert len(found) == 4
    for (metric, _), value in found.items():
        assert (value["value"], value["n"]) == (1.0, 21), metric
        assert value["low"] == pytest.approx(0.025 ** (1 / 21))  # Clopper-Pearson of 21 of 21
    rows = pq.read_table(config.out / "predictions.parquet").to_pylist()
    assert [row["images"] for row in rows] == ["noisy"] * 21 + ["standard"] * 21
    assert rows[8]["name"] == "green/1.png" and rows[8]["label"] == rows[8]["predicted"] == 1
    script.main(config)  # nothing left to do
    with pytest.raises(ValueError, match="another configuration"):
        script.main(dataclasses.replace(config, seed=1))


def test_bad_images_are_named(encoder, photos, tmp_path):
    folder = pathlib.Path(photos.removeprefix("folder:"))
    loose = tmp_path / "loose"
    for name in ("a", "b"):
        (loose / name).mkdir(parents=True)
        (loose / name / "0.png").write_bytes((folder / "red" / "0.png").read_bytes())
    (loose / "9.png").write_bytes((folder / "red" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="none with 9.png"):
        make_job(encoder, f"folder:{loose}", tmp_path / "out", num_draws=1).train()
    with pytest.raises(ValueError, match="at least 2 classes"):
        make_job(encoder, f"folder:{folder / 'red'}", tmp_path / "one")
    job = make_job(encoder, photos, tmp_path / "other", num_draws=1)
    with pytest.raises(ValueError, match="Unknown class of the test images 'a'"):
        job.test({}, data.open_images(f"folder:{loose}"), np.arange(2))
    with pytest.raises(ValueError, match="divisible by 8"):
        dataclasses.replace(job, config=ProbeConfig(batch_size=12))
    wild = dataclasses.replace(job, config=ProbeConfig(learning_rate=1e38, batch_size=8))
    with pytest.raises(ValueError, match="loss is (nan|inf) in epoch .* 1e\\+38"):
        wild.train()


# --- the probe on disk ----------------------------------------------------------------------------


def test_a_probe_knows_its_encoder(encoder, tmp_path):
    trained = {"kernel": np.ones((4, 3), np.float32), "bias": np.zeros(3, np.float32)}
    probing.save_probe(tmp_path / "probe", trained, encoder, {"kind": "noisy"})
    loaded = certification.load_probe(tmp_path / "probe", encoder)
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)
    assert Classifier(encoder, **jax.tree.map(jnp.asarray, loaded))(jnp.ones((1, *SIZE, 3))).shape
    # The same weights in bfloat16 are the same encoder.
    weights = jnp.full(4, 2.0).at[1].set(1.2345)
    small = from_fn(mean_colour, weights, input_size=SIZE, dtype="bfloat16")
    full = from_fn(mean_colour, weights, input_size=SIZE)
    probing.save_probe(tmp_path / "full", trained, full, {})
    probing.restore_probe(tmp_path / "full", small)

    with pytest.raises(ValueError, match="trained on other weights of encoder 'tiny'"):
        certification.load_probe(tmp_path / "probe", full)
    other = encoder.replace(representation="projection")
    with pytest.raises(ValueError, match="reads the representation 'paper'.*got 'projection'"):
        certification.load_probe(tmp_path / "probe", other)
    # Without that record only shapes are compared.
    checkpoints.save_encoder(tmp_path / "bare", trained, {"encoder": "tiny", "config": {}})
    assert probing.restore_probe(tmp_path / "bare", full)[1] == {}


def test_paper_and_features_of_one_output_are_one_representation(tmp_path):
    features, paper = (ur_jax.load_encoder("demo", representation=r) for r in ("features", "paper"))
    trained = {"kernel": np.ones((64, 3), np.float32), "bias": np.zeros(3, np.float32)}
    probing.save_probe(tmp_path / "probe", trained, features, {})
    certification.load_probe(tmp_path / "probe", paper)
    with pytest.raises(ValueError, match="reads the representation 'backbone'"):
        certification.load_probe(
            tmp_path / "probe", ur_jax.load_encoder("demo", representation="projection")
        )
