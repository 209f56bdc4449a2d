"""The label-free table of a user's own function, against NumPy; one compilation; its flags."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ur_jax import attacks, cli, data, runs
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError
from ur_jax.jobs import label_free, label_free_sizes
from ur_jax.jobs.label_free import EvaluationConfig, LabelFree
from ur_jax.jobs.progress import quiet

SIZE = (6, 5)
CONFIG = EvaluationConfig(
    num_images=13,
    eps=(0.05, 0.1),
    step_size=0.02,
    read_at=(1, 3),
    overlap_steps=2,
    breakaway_eps=0.2,
    breakaway_steps=4,
    batch_size=8,
)
WEIGHT = np.random.default_rng(0).standard_normal((90, 6)).astype(np.float32)


def random_projection(weight, images):
    """A user's own function: f(x) = W x."""
    return images.reshape(len(images), -1) @ weight


ENCODER = from_fn(random_projection, jnp.asarray(WEIGHT), input_size=SIZE)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """37 random images, one of them unreadable."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for i in range(37):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "06.png").write_bytes(b"not an image")
    return data.open_images(f"folder:{folder}")


def job(source, **changes):
    return LabelFree(
        encoder=ENCODER, images=source, protocol=dataclasses.replace(CONFIG, **changes)
    )


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A run left alone: its folder, its summary, and how many programs the attacks compiled to."""
    run = runs.Run(tmp_path_factory.mktemp("run") / "out")
    before = attacks.unsupervised._u_pgd._cache_size()
    with pytest.warns(UserWarning, match="06.png"):
        summary = job(source).run(run.path, progress=quiet)
    return run, summary, attacks.unsupervised._u_pgd._cache_size() - before


def _value(summary, metric, divergence, eps, step):
    (found,) = (
        row.estimate
        for row in summary.rows
        if (row.metric, row.divergence, row.eps, row.step) == (metric, divergence, eps, step)
    )
    return found


def _norms(difference):
    return {
        "l1": np.abs(difference).sum(-1),
        "l2": np.linalg.norm(difference, axis=-1),
        "linf": np.abs(difference).max(-1),
    }


@pytest.mark.filterwarnings("ignore:Skipped the unreadable")
def test_table_equals_numpy(finished, source):
    run, result, _ = finished
    batch = next(
        data.image_batches(source, range(37), input_size=SIZE, preparation="resize", batch_size=37)
    )
    clean = batch.images[batch.mask].reshape(36, -1).astype(np.float64) @ WEIGHT
    place = {index: row for row, index in enumerate(batch.indices[batch.mask])}
    pairs = _norms(np.stack([a - b for a, b in itertools.combinations(clean, 2)]))

    table = runs.read_table(run.path / "attacks.parquet")
    for (eps, step), d in itertools.product(itertools.product((0.05, 0.1), (1, 3)), pairs):

        def at(mode, step, eps=eps, d=d):
            rows = (table["mode"] == mode) & (table["eps"] == eps) & (table["step"] == step)
            return table[f"dist_{d}"][rows]

        share = lambda x, d=d: np.mean(pairs[d] <= x[:, None], axis=1)
        moved, towards = at("untargeted", step), at("targeted", step)
        expected = {
            "universal_quantile": np.median(share(moved)),
            "normalised_distance": np.median(moved) / np.median(pairs[d]),
            "universal_quantile_targeted": np.median(share(towards)),
            "relative_quantile": np.median(towards / at("targeted", 0)),
        }
        for name, value in expected.items():
            estimate = _value(result, name, d, eps, step)
            np.testing.assert_allclose(estimate.value, value, rtol=1e-4, atol=2e-3, err_msg=name)
            assert estimate.low <= estimate.value <= estimate.high

    part = run.read_parts("breakaway")
    own = np.linalg.norm(part["attacked"] - part["clean"], axis=1)
    to_bank = np.linalg.norm(part["attacked"][:, None] - clean, axis=2)
    nearer = to_bank < own[:, None]
    nearer[np.arange(len(own)), [place[i] for i in part["index"]]] = False
    rank = nearer.sum(1)
    step = CONFIG.breakaway_steps
    value = lambda name: _value(result, name, "l2", 0.2, step).value
    np.testing.assert_allclose(value("breakaway_risk"), np.mean(rank / 35), rtol=1e-6)
    np.testing.assert_allclose(value("top_1_accuracy"), np.mean(rank < 1))
    np.testing.assert_allclose(value("top_5_accuracy"), np.mean(rank < 5))
    assert 0 < rank.sum()

    margins = runs.read_table(run.path / "pairs.parquet")
    assert not set(margins["first"]) & set(margins["second"])
    for d in pairs:
        found = _value(result, "overlap_risk", d, 0.05, 2)
        np.testing.assert_allclose(found.value, np.mean(margins[f"margin_{d}"] < 0))
        first, second = (clean[[place[i] for i in margins[name]]] for name in ("first", "second"))
        np.testing.assert_allclose(margins[f"clean_dist_{d}"], _norms(first - second)[d], rtol=1e-4)


def test_targets_are_other_images_and_every_image_is_a_target(finished):
    table = runs.read_table(finished[0].path / "attacks.parquet")
    rows = (table["mode"] == "targeted") & (table["step"] == 0) & (table["eps"] == 0.05)
    images, targets = table["image"][rows], table["target"][rows]
    assert np.all(images != targets) and len(set(targets)) == len(targets)


def test_unreadable_image_is_named_and_left_out(finished):
    run, summary, _ = finished
    assert list(summary.unreadable) == ["06.png"]
    assert len(run.read_parts("clean")["clean"]) == 36
    table = runs.read_table(run.path / "attacks.parquet")
    assert 6 not in table["image"] and 6 not in table["target"]


def test_each_configuration_compiles_once_over_an_uneven_last_batch(finished):
    # 13 images in batches of 8. Untargeted and targeted at any eps, and the shorter one on pairs;
    # the breakaway attack is an untargeted one of as many steps.
    assert finished[2] == 3


def test_clean_representations_are_shared_between_runs(source, finished, tmp_path, monkeypatch):
    passes, encode = [], label_free.parts.encode
    monkeypatch.setattr(label_free.parts, "encode", lambda *a: passes.append(1) or encode(*a))
    for name in ("distances", "breakaway"):
        one = dataclasses.replace(job(source), stages=(name,))
        with pytest.warns(UserWarning, match="06.png"):
            summary = one.run(tmp_path / name, bank=tmp_path / "bank", progress=quiet, plots=False)
        # By their text: a row with a NaN is equal to no other one from Python 3.13 on.
        assert set(map(repr, summary.rows)) <= set(map(repr, finished[1].rows))
    assert len(passes) == 5 + 2  # 37 images once, and the attacked ones


def test_the_batch_size_is_found_and_kept_for_a_run_that_goes_on(source, tmp_path, monkeypatch):
    unknown = dataclasses.replace(job(source, batch_size=None, num_images=20), stages=("overlap",))
    monkeypatch.setattr(label_free_sizes.memory, "fit_batch_size", lambda *_, **__: 64)
    with pytest.warns(UserWarning, match="06.png"):
        first = unknown.run(tmp_path / "out", progress=quiet, plots=False)
    # 20 images are 3 for each of 8 devices.
    assert first.identity["protocol"]["batch_size"] == 24
    monkeypatch.setattr(label_free_sizes.memory, "fit_batch_size", lambda *_, **__: 1)
    assert unknown.run(tmp_path / "out", progress=quiet, plots=False) == first
    with pytest.warns(UserWarning, match="06.png"):
        other = unknown.run(tmp_path / "other", progress=quiet, plots=False)
    assert other.identity["protocol"]["batch_size"] == 8


def test_presets_give_defaults_that_flags_change():
    words = "--preset quick --encoder demo --images demo --out x --eps 0.2".split()
    flags = cli.parse(cli.find("evaluate"), words)
    quick = LabelFree.presets["quick"].protocol
    assert flags.job.protocol == dataclasses.replace(quick, eps=(0.2,))
    with pytest.raises(UserError, match="Unknown preset 'quik'.*'quick'"):
        cli.parse(cli.find("evaluate"), ["--preset", "quik"])


def test_bad_input(source):
    for change, message in (
        ({"num_images": 38}, "38 samples of a listing of 37"),
        ({"num_images": 4, "batch_size": 12}, "divisible by 8 devices, got 12"),
    ):
        with pytest.raises(UserError, match=message):
            job(source, **change).run(progress=quiet)
    with pytest.raises(UserError, match="Unknown stages 'overlpa'; did you mean 'overlap'"):
        dataclasses.replace(job(source), stages=("overlpa",)).run(progress=quiet)
    for change, message in (
        ({"eps": (0.0,)}, "eps > 0"),
        ({"step_size": -1.0}, "step_size > 0"),
        ({"read_at": (0,)}, "read_at >= 1"),
        ({"num_images": 1}, "num_images >= 2"),
    ):
        with pytest.raises(UserError, match=message):
            EvaluationConfig(**change)
