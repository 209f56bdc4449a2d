"""Randomized smoothing on a linear classifier, whose robust radius is a distance to a plane."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ur_jax.certify import (
    Classifier,
    RandomizedConfig,
    average_certified_radius,
    certified_accuracy,
    certified_radius,
    certify,
    check_labels,
    lower_bound,
    nearest_image_classifier,
    randomized_smoothing,
    smoothed_predictions,
)
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("optimised")

NUM_IMAGES = 24
CONFIG = RandomizedConfig(sigma=0.25, n0=200, n=20_000, alpha=0.01, clip=False)


def flatten_and_multiply(params, images):
    return images.reshape(images.shape[0], -1) @ params


def flatten_and_multiply_far_away(params, images):
    return 100.0 + flatten_and_multiply(params, images)


def flat_output(params, images):
    return flatten_and_multiply(params, images)[:, 0]


@pytest.fixture(scope="module")
def linear():
    """A two-class classifier, images, and their signed distances to its decision plane."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 2)).astype(np.float32) / 7
    images = rng.random((NUM_IMAGES, 4, 4, 3)).astype(np.float32)
    encoder = from_fn(flatten_and_multiply, weight, input_size=(4, 4))
    logits = images.reshape(NUM_IMAGES, -1).astype(np.float64) @ weight
    distances = (logits[:, 0] - logits[:, 1]) / np.linalg.norm(weight[:, 0] - weight[:, 1])
    return Classifier(encoder, jnp.eye(2), jnp.zeros(2)), images, distances


def run(classifier, images, config):
    return dict(randomized_smoothing(classifier, images, jax.random.key(0), config=config))


@pytest.mark.parametrize("bound", ["exact", "union", "betting"])
def test_radius_never_exceeds_the_distance_and_approaches_it(linear, bound):
    classifier, images, distances = linear
    config = dataclasses.replace(CONFIG, bound=bound)
    errors = []
    for n in (500, 20_000) if bound == "exact" else (20_000,):
        certificates = run(classifier, images, dataclasses.replace(config, n=n))
        radius = np.array([certificates[i].radius for i in range(NUM_IMAGES)])
        predicted = np.array([certificates[i].predicted for i in range(NUM_IMAGES)])
        abstained = np.array([certificates[i].abstained for i in range(NUM_IMAGES)])
        assert np.all(radius <= np.abs(distances))
        assert np.all(abstained | (predicted == (distances < 0)))
        assert np.all((radius == 0) == abstained)
        near = np.abs(distances) < 2 * config.sigma  # beyond, p is too near 1 for these n
        errors.append(np.mean(np.abs(distances)[near] - radius[near]))
    # The default tolerance of the adaptive bounds is sigma / 10.
    limit = 0.01 if bound == "exact" else 0.025 + 0.01
    assert errors[-1] < limit and errors == sorted(errors, reverse=True)


def test_radii_are_decided_as_the_distance_says(linear):
    classifier, images, distances = linear
    config = dataclasses.replace(CONFIG, bound="union", radii=(0.1, 0.25))
    for index, certificate in run(classifier, images, config).items():
        for radius, decision in zip(config.radii, certificate.decisions, strict=True):
            if decision == "robust":
                assert radius <= abs(distances[index])
                assert certificate.radius >= radius and not certificate.abstained
            if abs(abs(distances[index]) - radius) > 0.02:
                assert (decision == "robust") == (abs(distances[index]) > radius)


def test_certificates_follow_from_their_counts_at_another_alpha(linear):
    classifier, images, _ = linear
    certificate = certify(classifier, images[0], jax.random.key(0), config=CONFIG)
    expected = stats.beta.ppf(0.01, certificate.count, certificate.n - certificate.count + 1)
    np.testing.assert_allclose(certificate.lower, expected, rtol=1e-12)
    np.testing.assert_allclose(certificate.radius, 0.25 * stats.norm.ppf(expected), rtol=1e-12)
    strict = dataclasses.replace(CONFIG, alpha=1e-4)
    expected = stats.beta.ppf(1e-4, certificate.count, certificate.n - certificate.count + 1)
    np.testing.assert_allclose(lower_bound(certificate.count, certificate.n, strict), expected)
    assert certified_radius(0.5, 0.25) == 0.0 and certified_radius(0.2, 0.25) == 0.0
    radii = [certified_radius(lower_bound(k, 100, CONFIG), 0.25) for k in range(101)]
    assert np.all(np.diff(radii) >= 0)


def test_prediction_abstains_where_two_classes_tie(linear):
    classifier, images, distances = linear
    # Moved onto the decision plane, each class has probability 1/2; from the middle of all images,
    # so that they stay images.
    weight = np.asarray(classifier.encoder.params)
    normal = weight[:, 0] - weight[:, 1]
    normal = normal / np.linalg.norm(normal)
    grey = 0.25 + 0.5 * images
    away = grey.reshape(NUM_IMAGES, -1) @ normal
    on_plane = grey - away[:, None, None, None] * normal.reshape(4, 4, 3)
    key = jax.random.key(1)
    tied = dict(smoothed_predictions(classifier, on_plane, key, config=CONFIG))
    assert sum(not p.abstained for p in tied.values()) <= 3
    for p in tied.values():
        assert p.counts.sum() == 200
        np.testing.assert_allclose(p.p_value, stats.binomtest(int(p.counts[0]), 200).pvalue)
    clear = dict(smoothed_predictions(classifier, images, key, config=CONFIG))
    for index, p in clear.items():
        assert p.abstained or p.predicted == (distances[index] < 0)


def test_accuracy_and_average_radius():
    radius = np.array([0.0, 0.3, 0.5, 0.9])
    correct = np.array([False, True, True, False])
    np.testing.assert_allclose(
        certified_accuracy(radius, correct, np.array([0.0, 0.3, 0.4, 1.0])), [0.5, 0.5, 0.25, 0.0]
    )
    assert average_certified_radius(radius, correct) == pytest.approx(0.2)
    assert average_certified_radius(radius, correct, only_correct=True) == pytest.approx(0.4)
    assert average_certified_radius(radius, np.zeros(4, bool), only_correct=True) == 0.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sigma": 0.0}, "sigma > 0"),
        ({"sigma": -1.0}, "sigma > 0"),
        ({"sigma": math.nan}, "sigma > 0"),
        ({"alpha": 0.0}, "alpha > 0 and < 1"),
        ({"alpha": 1.0}, "alpha > 0 and < 1"),
        ({"n0": 0}, "n0 >= 1"),
        ({"n0": 2.5}, "n0 >= 1, got 2.5, which is no integer"),
        ({"n": math.nan}, "n >= 1, got nan"),
        ({"n": 2**31}, "less than 2.31 samples"),
        ({"clip": 1}, "clip to be True or False"),
        ({"radii": 0.5}, "radii as a tuple"),
        ({"radii": (0.1, math.nan)}, "radii >= 0, got nan"),
        ({"tolerance": math.nan}, "tolerance > 0, got nan"),
        ({"n": 9}, "n >= 10"),
        ({"n": 10, "bound": "union"}, "n >= 11"),
        ({"n": 100, "radii": (0.5,)}, "n >= 301"),
        ({"bound": "hoefding"}, "Expected one of"),
        ({"radii": (-0.1,)}, "radii >= 0"),
        ({"radii": (99.0,)}, "a larger sigma"),
        ({"tolerance": 0.0}, "tolerance > 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        RandomizedConfig(**{"alpha": 0.001, "n": 100_000, **settings})


def test_the_named_n_would_do():
    RandomizedConfig(n=10)
    RandomizedConfig(n=11, bound="union")
    RandomizedConfig(n=301, radii=(0.5,))


def test_a_classifier_of_the_wrong_shape_is_refused():
    image = jnp.full((4, 4, 3), 0.5)
    weight = jnp.ones((48, 1))
    for fn in (flat_output, flatten_and_multiply):
        with pytest.raises(ValueError, match=r"logits \[B,K\]"):
            certify(lambda x, fn=fn: fn(weight, x), image, jax.random.key(0), config=CONFIG)


def not_finite_where_bright(params, images):
    bright = images.mean((1, 2, 3)) > 0.8
    return jnp.where(bright[:, None], jnp.nan, flatten_and_multiply(params, images))


def test_logits_that_are_not_finite_are_no_class(linear):
    classifier, images, _ = linear
    encoder = from_fn(not_finite_where_bright, classifier.encoder.params, input_size=(4, 4))
    classifier = classifier.replace(encoder=encoder)
    images = np.stack([images[0], np.ones_like(images[0])])
    certificates = run(classifier, images, CONFIG)
    assert not certificates[0].abstained and certificates[0].num_bad == 0
    bad = certificates[1]
    assert bad.abstained and bad.radius == 0.0 and bad.reason == "logits not finite"
    assert bad.num_bad > 0
    prediction = dict(smoothed_predictions(classifier, images, jax.random.key(0), config=CONFIG))[1]
    assert prediction.abstained and prediction.counts.sum() == 0


def test_the_nearest_image_classifier_finds_the_nearest_image(linear):
    classifier, images, _ = linear
    # A large common offset, which would cancel in the plain formula.
    shifted = from_fn(flatten_and_multiply_far_away, classifier.encoder.params, input_size=(4, 4))
    clean = np.asarray(shifted(jnp.asarray(images)), np.float64)
    nearest = nearest_image_classifier(shifted, shifted(jnp.asarray(images)))
    queries = np.random.default_rng(2).random((50, 4, 4, 3)).astype(np.float32)
    distances = np.linalg.norm(
        np.asarray(shifted(jnp.asarray(queries)), np.float64)[:, None] - clean, axis=2
    )
    found = np.argmax(nearest(jnp.asarray(queries)), axis=1)
    chosen = distances[np.arange(50), found]
    np.testing.assert_allclose(chosen, distances.min(axis=1), atol=1e-4)
    assert np.mean(found == distances.argmin(axis=1)) >= 0.9


def test_labels_beyond_the_probe_are_refused():
    check_labels(np.array([0, 9]), 10)
    for labels in ([0, 10], [-1, 3]):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            check_labels(np.array(labels), 10)


def test_a_randomised_bound_is_larger_and_follows_from_what_is_kept(linear):
    classifier, images, distances = linear
    plain = run(classifier, images[:6], CONFIG)
    config = dataclasses.replace(CONFIG, randomize=True)
    found = run(classifier, images[:6], config)
    for index, certificate in found.items():
        assert certificate.count == plain[index].count and plain[index].uniform == 1.0
        assert certificate.lower >= plain[index].lower and 0.05 <= certificate.uniform <= 1
        again = lower_bound(certificate.count, certificate.n, config, certificate.uniform)
        assert again == certificate.lower
        assert certificate.radius <= abs(distances[index])
    assert len({certificate.uniform for certificate in found.values()}) == 6
    with pytest.raises(UserError, match="'exact' with randomize"):
        dataclasses.replace(config, bound="union")


def test_a_calibrated_sequence_decides_the_radii(linear):
    classifier, images, distances = linear
    config = dataclasses.replace(CONFIG, bound="calibrated", radii=(0.05, 0.2))
    for index, certificate in run(classifier, images[:6], config).items():
        for radius, decision in zip(config.radii, certificate.decisions):
            if abs(abs(distances[index]) - radius) > 0.05:
                wanted = "robust" if abs(distances[index]) > radius else "not robust"
                assert decision == wanted
        assert min(abs(certificate.radius - r) for r in (0.0, 0.05, 0.2)) < 1e-9
