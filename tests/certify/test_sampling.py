"""The sampler: bits of the noise, slots, devices, batches, interruptions, and the compiled loop."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ur_jax.certify import Classifier, RandomizedConfig, randomized_smoothing
from ur_jax.certify.randomized.smoothing import _Classes, _tables
from ur_jax.certify.sampling import noisy_samples, sample_outputs
from ur_jax.certify.sequential import Rows, advance, stream
from ur_jax.devices import data_mesh
from ur_jax.encoders import from_fn

SHAPE = (4, 4, 3)
CONFIG = RandomizedConfig(n0=100, n=3000, bound="union", alpha=0.01, clip=False, step=64)


def flatten_and_multiply(params, images):
    return jnp.cos(images.reshape(images.shape[0], -1) @ params)


@pytest.fixture(scope="module")
def classifier():
    weight = np.random.default_rng(0).standard_normal((48, 3)).astype(np.float32) / 7
    encoder = from_fn(flatten_and_multiply, weight, input_size=SHAPE[:2])
    return Classifier(encoder, jnp.eye(3), jnp.zeros(3))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).random((11, *SHAPE)).astype(np.float32)


def classify(classifier, images):
    return classifier(images)


def raw_pixels(operand, images):
    return images


def test_noise_is_keyed_by_seed_image_and_sample_alone(images):
    key = jax.random.key(3)
    twin = [
        images[2]
        + np.float32(0.25)
        * np.asarray(jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 7), i), SHAPE))
        for i in range(5, 42)
    ]
    draws = [
        sample_outputs(
            raw_pixels,
            (),
            images[2],
            key,
            jnp.int32(7),
            jnp.int32(5),
            n=37,
            sigma=0.25,
            clip=False,
            mesh=data_mesh(jax.devices()[:num_devices]),
            batch_size=batch_size,
        )
        for num_devices, batch_size in ((1, 64), (8, 16))
    ]
    for draw in draws:
        np.testing.assert_array_equal(draw, draws[0])
    np.testing.assert_allclose(draws[0], twin, atol=1e-7)
    # Starting later, as after an interruption, draws the same.
    later = sample_outputs(
        raw_pixels,
        (),
        images[2],
        key,
        jnp.int32(7),
        jnp.int32(20),
        n=37,
        sigma=0.25,
        clip=False,
        mesh=data_mesh(),
        batch_size=16,
    )
    np.testing.assert_array_equal(later[:22], draws[0][15:])


def test_noise_is_standard_normal_and_never_drawn_twice():
    n = 4000
    image = jnp.full((2, 2, 3), 0.5)
    draw = lambda index: sample_outputs(
        raw_pixels,
        (),
        image,
        jax.random.key(0),
        jnp.int32(index),
        jnp.int32(0),
        n=n,
        sigma=0.5,
        clip=False,
        mesh=data_mesh(),
        batch_size=100,
    )
    noise = (np.stack([draw(0), draw(1)]) - 0.5) / 0.5
    assert len(np.unique(noise.reshape(2 * n, -1), axis=0)) == 2 * n
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise.reshape(2 * n, -1).T)
    assert np.abs(correlation - np.eye(12)).max() < 5 / np.sqrt(2 * n)
    ones = jnp.ones(2, jnp.int32)
    clipped = noisy_samples(
        jnp.stack([image, image]), jax.random.key(0), ones, ones, sigma=2.0, clip=True
    )
    assert clipped.min() == 0.0 and clipped.max() == 1.0


def certify_all(classifier, images, indices, *, num_devices=8, **changes):
    settings = {"config": CONFIG, "batch_size": 32, **changes}
    run = randomized_smoothing(
        classifier,
        images,
        jax.random.key(5),
        indices=indices,
        mesh=data_mesh(jax.devices()[:num_devices]),
        **settings,
    )
    return dict(run)


def test_devices_slots_batches_and_interruptions_change_nothing(classifier, images):
    whole = certify_all(classifier, images, range(11))
    assert sorted(whole) == list(range(11))
    assert len({c.n for c in whole.values()}) > 2  # images are decided at different times
    assert certify_all(classifier, images, range(11), num_devices=1) == whole
    assert certify_all(classifier, images, range(11), num_devices=3, batch_size=7) == whole
    # Interrupted after four images, in another order: each image has the certificate it had.
    rest = certify_all(classifier, images[:3:-1], range(10, 3, -1))
    assert rest == {index: whole[index] for index in range(4, 11)}
    # A single image gets all slots.
    assert certify_all(classifier, images[6:7], [6]) == {6: whole[6]}


def test_counts_agree_with_a_plain_loop(classifier, images):
    certificates = certify_all(classifier, images, range(11))
    for index in (0, 4, 9):
        outputs = sample_outputs(
            classify,
            classifier,
            images[index],
            jax.random.key(5),
            jnp.int32(index),
            jnp.int32(0),
            n=3100,
            sigma=CONFIG.sigma,
            clip=False,
            mesh=data_mesh(),
            batch_size=64,
        )
        certificate, classes = certificates[index], np.argmax(outputs, axis=1)
        assert np.bincount(classes[:100]).argmax() == certificate.predicted
        tested = classes[100 : certificate.num_drawn]
        assert len(tested) == certificate.n
        assert np.sum(tested == certificate.predicted) == certificate.count


def test_progress_counts_every_sample_once(classifier, images):
    seen = []
    certificates = certify_all(classifier, images, range(11), on_progress=seen.append)
    pieces = sum(2 + -(-c.n // CONFIG.step) for c in certificates.values())
    assert sum(seen) == pieces * CONFIG.step


def test_images_are_taken_as_places_free_up(classifier):
    taken = []

    def endless():
        for i in range(10**9):
            taken.append(i)
            yield np.full(SHAPE, 0.5, np.float32)

    run = randomized_smoothing(
        classifier, endless(), jax.random.key(0), config=CONFIG, mesh=data_mesh(), batch_size=32
    )
    for _ in range(3):
        next(run)
    assert len(taken) < 60


def compiled_text(classifier, mesh):
    method = _Classes(sigma=0.25, clip=False, n0=100, n=3000, step=64, num_events=3)
    tables = jax.tree.map(jnp.asarray, _tables(CONFIG))
    rows = Rows(
        images=jnp.zeros((8, *SHAPE)),
        indices=jnp.zeros(8, jnp.int32),
        extra=(),
        pieces=jnp.zeros(8, jnp.int32),
        counts=jnp.zeros((8, 3), jnp.int32),
        num_bad=jnp.zeros(8, jnp.int32),
        answer=(jnp.zeros(8, jnp.int32), jnp.zeros((8, 1), jnp.int8)),
        done=jnp.zeros(8, bool),
    )
    lowered = advance.lower(
        classifier,
        jax.random.key(0),
        tables,
        rows,
        jnp.int32(9),
        jnp.int32(1),
        method=method,
        mesh=mesh,
        num_slots=4,
        batch_size=8,
    )
    return lowered.compile().as_text()


def test_the_inner_loop_has_no_collective_and_nothing_calls_the_host(classifier):
    text = compiled_text(classifier, data_mesh())
    collective = re.compile(r"(?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(")
    scope = lambda line: re.search(r'op_name="([^"]*)"', line).group(1)
    lines = text.splitlines()
    # One loop holds the rounds, each with one collective; a loop inside it draws the samples.
    assert [scope(line) for line in lines if collective.search(line)] == [
        "jit(advance)/shard_map/while/body/psum"
    ]
    encoding = [scope(line) for line in lines if " cosine(" in line]
    assert encoding and all("shard_map/while/body/while/body" in place for place in encoding)
    assert "callback" not in text and "outfeed" not in text


def test_one_compilation_for_all_images_and_equal_settings(classifier, images):
    certify_all(classifier, images, range(11))
    before = advance._cache_size()
    other = Classifier(classifier.encoder, 2 * classifier.kernel, classifier.bias)
    certify_all(other, images[:5], range(5), config=RandomizedConfig(**vars(CONFIG)))
    assert advance._cache_size() == before


def test_an_empty_run_yields_nothing(classifier):
    assert certify_all(classifier, [], []) == {}
    method = _Classes(sigma=0.25, clip=False, n0=100, n=3000, step=64, num_events=3)
    empty = stream(
        classifier,
        [],
        jax.random.key(0),
        method=method,
        tables=(),
        answer=(),
        mesh=data_mesh(),
        batch_size=8,
    )
    assert list(empty) == []
