"""What is no image, no key, no model or no setting is refused in one line, before it is sampled."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.certify import (
    CenterConfig,
    Classifier,
    RandomizedConfig,
    center_smoothing,
    certify,
    randomized_smoothing,
    smoothed_predictions,
)
from ur_jax.certify.sampling import sample_outputs
from ur_jax.devices import data_mesh
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError

CENTER = CenterConfig(n0=600, n=600, alpha1=0.05, alpha2=0.05, delta=0.1)
RANDOMIZED = RandomizedConfig(n=100)
KEY = jax.random.key(0)
IMAGE = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)


def flatten(params, images):
    return images.reshape(images.shape[0], -1) @ params


ENCODER = from_fn(flatten, jnp.ones((48, 2)), input_size=(4, 4))
CLASSIFIER = Classifier(ENCODER, jnp.eye(2), jnp.zeros(2))
ENTRIES = {
    "certify, center": lambda image, key=KEY, model=ENCODER, **rest: certify(
        model, image, key, **{"config": CENTER} | rest
    ),
    "certify, randomized": lambda image, key=KEY, model=CLASSIFIER, **rest: certify(
        model, image, key, **{"config": RANDOMIZED} | rest
    ),
    "certify, a function": lambda image, key=KEY, model=lambda x: CLASSIFIER(x), **rest: certify(
        model, image, key, **{"config": RANDOMIZED} | rest
    ),
    "center_smoothing": lambda image, key=KEY, model=ENCODER, **rest: list(
        center_smoothing(model, [IMAGE, image], key, **{"config": CENTER} | rest)
    ),
    "randomized_smoothing": lambda image, key=KEY, model=CLASSIFIER, **rest: list(
        randomized_smoothing(model, [image, IMAGE], key, **{"config": RANDOMIZED} | rest)
    ),
    "smoothed_predictions": lambda image, key=KEY, model=CLASSIFIER, **rest: list(
        smoothed_predictions(model, [image, IMAGE], key, **{"config": RANDOMIZED} | rest)
    ),
}
BAD_IMAGES = {
    "NaN": (IMAGE * np.nan, "NaN or infinity"),
    "one NaN": (np.where(np.arange(48).reshape(4, 4, 3) == 17, np.nan, IMAGE), "NaN or infinity"),
    "infinite": (np.full_like(IMAGE, np.inf), "NaN or infinity"),
    "255": (IMAGE * 255, "divide by 255"),
    "negative": (IMAGE - 0.5, r"got \[-0"),
    "bytes": ((IMAGE * 255).astype(np.uint8), "uint8"),
    "half": (IMAGE.astype(np.float16), "float16"),
    "a batch": (IMAGE[None], r"\[H,W,3\], got an array of shape \(1, 4, 4, 3\)"),
    "grey": (IMAGE[..., 0], r"\[H,W,3\], got"),
    "one channel": (IMAGE[..., :1], "(B,H,W,3)"),
    "a list": (IMAGE.tolist(), "an array, got list"),
    "empty": (IMAGE[:0], "(B,H,W,3)"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_no_image(entry, name):
    image, message = BAD_IMAGES[name]
    with pytest.raises(UserError, match=message) as error:
        ENTRIES[entry](image)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", [name for name in ENTRIES if "function" not in name])
def test_images_of_another_size(entry):
    with pytest.raises(UserError, match=r"4,4,3\) for encoder"):
        ENTRIES[entry](np.zeros((5, 4, 3), np.float32))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key": jax.random.PRNGKey(0)}, "typed key"),
        ({"key": 0}, "typed key"),
        ({"key": jax.random.split(KEY)}, "one key"),
        ({"config": None}, "config|settings"),
        ({"config": {"n": 3}}, "config|settings"),
        ({"model": None}, "Expected .*(encoder|model|classifier)"),
    ],
)
def test_other_arguments(entry, changes, message):
    with pytest.raises(UserError, match=message) as error:
        ENTRIES[entry](IMAGE, **changes)
    assert "\n" not in str(error.value)


def test_an_encoder_is_no_classifier_and_a_classifier_no_encoder():
    """It certified "class 12" of a representation."""
    for entry in ("certify, randomized", "randomized_smoothing", "smoothed_predictions"):
        with pytest.raises(UserError, match="a representation has no classes"):
            ENTRIES[entry](IMAGE, model=ENCODER)
    for entry in ("certify, center", "center_smoothing"):
        with pytest.raises(UserError, match="to be an Encoder, got Classifier"):
            ENTRIES[entry](IMAGE, model=CLASSIFIER)
    with pytest.raises(UserError, match="a CenterConfig, got RandomizedConfig"):
        ENTRIES["center_smoothing"](IMAGE, config=RANDOMIZED)


@pytest.mark.parametrize("smooth, model, config", [
    (center_smoothing, ENCODER, CENTER), (randomized_smoothing, CLASSIFIER, RANDOMIZED),
])  # fmt: skip
def test_every_image_needs_an_index(smooth, model, config):
    images = np.stack([IMAGE, IMAGE])
    cases = [
        ({"indices": [0]}, "an index for each image, got 1 for 2"),
        ({"indices": iter([0])}, "more images than indices"),
        ({"indices": [0, -1]}, r"\[0, 2.31\), got -1"),
        ({"indices": [0, 1.5]}, "got 1.5"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"batch_size": 2.5}, "batch_size >= 1"),
        ({"mesh": 8}, "mesh to be a Mesh"),
    ]
    for rest, message in cases:
        with pytest.raises(UserError, match=message):
            list(smooth(model, images, KEY, config=config, **rest))
    with pytest.raises(UserError, match=r"images \[N,H,W,3\], got an array of shape \(4, 4, 3\)"):
        smooth(model, IMAGE, KEY, config=config)
    with pytest.raises(UserError, match="Image 7: "):
        list(smooth(model, [IMAGE, IMAGE * 2], KEY, config=config, indices=[3, 7]))


def represent(encoder, images):
    return encoder(images)


def test_images_of_one_index_have_the_same_noise_whatever_the_method():
    """What `certify` says of its index: not of one image alone, nor of one method."""
    first, again, other = (certify(ENCODER, IMAGE, KEY, config=CENTER, index=i) for i in (0, 0, 1))
    np.testing.assert_array_equal(first.distances, again.distances)
    assert not np.array_equal(first.distances, other.distances)
    # Its samples are those from 0 on of key and index, as those of randomized smoothing are (see
    # test_sampling): the center among the first n0, the n0 of the check after them.
    samples = sample_outputs(
        represent, ENCODER, jnp.asarray(IMAGE), KEY, jnp.int32(0), jnp.int32(0), n=1200,
        sigma=CENTER.sigma, clip=False, mesh=data_mesh(), batch_size=64,
    )  # fmt: skip
    samples = np.asarray(samples, np.float64)
    away = np.linalg.norm(samples[:600, None] - samples[:600], axis=2)
    medians = np.sort(away, axis=1)[:, 299]
    center = samples[medians.argmin()]
    np.testing.assert_allclose(first.radius, medians.min(), rtol=1e-5)
    inside = np.linalg.norm(samples[600:] - center, axis=1) <= medians.min()
    assert abs(first.num_in_ball - inside.sum()) <= 1  # one may lie on the border


NEVER_RIGHT = (math.nan, math.inf, -1, -0.5, "x", b"1", [], {}, 1j, 10**400, object())
"""No setting of a certificate may be one of these."""


@pytest.mark.parametrize("bound", ["exact", "hoeffding", "union", "betting"])
@pytest.mark.parametrize("kind", [CenterConfig, RandomizedConfig])
def test_every_setting_of_no_sense_is_one_line(kind, bound):
    for field in dataclasses.fields(kind):
        for value in (*NEVER_RIGHT, None, 2.5, 0, 1e-320, np.array([1.0, 2.0])):
            try:
                kind(**{"bound": bound, field.name: value})
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert not any(value is each for each in NEVER_RIGHT), (field.name, value)
