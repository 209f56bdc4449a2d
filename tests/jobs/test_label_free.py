"""The label-free table of a user's own function, against NumPy; resumed runs; one compilation."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ur_jax import attacks, data, runs
from ur_jax.encoders import from_fn
from ur_jax.jobs import label_free

SIZE = (6, 5)
CONFIG = label_free.EvaluationConfig(
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


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A run left alone, and how many programs the attacks were compiled to."""
    run = runs.open_run(tmp_path_factory.mktemp("run") / "out", CONFIG)
    before = attacks.unsupervised._u_pgd._cache_size()
    with pytest.warns(UserWarning, match="06.png"):
        result = label_free.evaluate(ENCODER, source, run, config=CONFIG)
    return run, result, attacks.unsupervised._u_pgd._cache_size() - before


def _value(result, metric, divergence, eps, step):
    (found,) = (
        m.estimate
        for m in result.measurements
        if (m.metric, m.divergence, m.step) == (metric, divergence, step) and m.eps == eps
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
    run, result, _ = finished
    assert [name for name in result.unreadable] == ["06.png"]
    assert len(run.read_parts("clean")["clean"]) == 36
    table = runs.read_table(run.path / "attacks.parquet")
    assert 6 not in table["image"] and 6 not in table["target"]


def test_each_configuration_compiles_once_over_an_uneven_last_batch(finished):
    # 13 images in batches of 8. Untargeted and targeted at any eps, and the shorter one on pairs;
    # the breakaway attack is an untargeted one of as many steps.
    assert finished[2] == 3


@pytest.mark.parametrize("num_batches", [1, 4, 8, 13])
@pytest.mark.filterwarnings("ignore:Skipped the unreadable")
def test_an_interrupted_run_ends_with_the_same_numbers(finished, source, tmp_path, num_batches):
    left = itertools.count(num_batches, -1)

    def interrupted(iterable, description, total):
        for item in iterable:
            if next(left) == 0:
                raise KeyboardInterrupt
            yield item

    run = runs.open_run(tmp_path / "out", CONFIG)
    with pytest.raises(KeyboardInterrupt):
        label_free.evaluate(ENCODER, source, run, config=CONFIG, progress=interrupted)
    resumed = label_free.evaluate(ENCODER, source, run, config=CONFIG)
    _, expected, _ = finished
    assert resumed.measurements == expected.measurements
    assert resumed.unreadable == expected.unreadable
    jax.tree.map(np.testing.assert_array_equal, resumed.gallery, expected.gallery)
    for name in ("attacks", "pairs", "neighbours"):
        one, two = (runs.read_table(r.path / f"{name}.parquet") for r in (run, finished[0]))
        jax.tree.map(np.testing.assert_array_equal, one, two)


def test_bad_input(source, tmp_path):
    run = runs.open_run(tmp_path / "out", {})
    with pytest.raises(ValueError, match="38 samples of a listing of 37"):
        label_free.evaluate(
            ENCODER, source, run, config=label_free.EvaluationConfig(num_images=38, batch_size=8)
        )
    with pytest.raises(ValueError, match="divisible by 8 devices, got 12"):
        label_free.evaluate(
            ENCODER, source, run, config=label_free.EvaluationConfig(num_images=4, batch_size=12)
        )
    for change, message in (
        ({"eps": (0.0,)}, "eps > 0"),
        ({"step_size": -1.0}, "step_size > 0"),
        ({"read_at": (0,)}, "read_at >= 1"),
        ({"num_images": 1}, "num_images >= 2"),
    ):
        with pytest.raises(ValueError, match=message):
            label_free.EvaluationConfig(**change)
