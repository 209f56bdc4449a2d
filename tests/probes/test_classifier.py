"""The classifier into the nearest image: its formula, and what it refuses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.encoders import from_fn
from ur_jax.metrics.checks import check_spread
from ur_jax.probes.classifier import nearest_image_classifier


def flat(weight, images):
    return images.reshape(len(images), -1) * weight


ENCODER = from_fn(flat, jnp.ones(1), input_size=(2, 2), name="flat")


def test_the_largest_logit_is_the_nearest_image_even_far_from_the_origin():
    rng = np.random.default_rng(0)
    images = rng.random((20, 2, 2, 3), np.float32)
    for offset in (0.0, 1000.0):
        clean = images[:5].reshape(5, -1) + np.float32(offset)
        classifier = nearest_image_classifier(ENCODER, clean)
        logits = (images.reshape(20, -1) + np.float32(offset)) @ classifier.kernel + classifier.bias
        distance = np.linalg.norm(images.reshape(20, 1, -1) - images[:5].reshape(5, -1), axis=-1)
        np.testing.assert_array_equal(np.asarray(logits).argmax(1), distance.argmin(1))


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-10, 1e10])
def test_a_collapsed_encoder_is_no_classifier(value):
    """The encoder of a constant; by rounding, one of almost a constant."""
    rng = np.random.default_rng(0)
    rows = np.full((4, 12), value, np.float32) * (1 + 1e-7 * rng.random((4, 12), np.float32))
    with pytest.raises(ValueError, match="encoder 'flat' are collapsed: 4 images have the same"):
        nearest_image_classifier(ENCODER, rows)
    different = rows.copy()
    different[2, 3] += np.float32(1.0) if value == 0 else np.float32(value / 100)
    nearest_image_classifier(ENCODER, different)


def test_too_few_or_not_finite():
    for rows, message in (
        (np.ones((1, 12), np.float32), "at least 2 representations, got 1"),
        (np.full((3, 12), np.nan, np.float32), "3 rows with NaN"),
        (np.ones(12, np.float32), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest_image_classifier(ENCODER, rows)
    check_spread(np.ones((1, 3)), "one image says nothing")
