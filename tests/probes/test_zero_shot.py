"""Class embeddings as a linear head: what they classify, and what is refused."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.encoders.base import from_fn
from ur_jax.errors import UserError
from ur_jax.probes.checkpoint import load_probe

CLASSES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0]], np.float32)
NAMES = ["red", "green", "blue", "lime"]


def _colour(params, images):
    mean = images.mean((1, 2))
    return params["one"] * mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def encoder():
    return from_fn(_colour, {"one": np.ones((), np.float32)}, input_size=(2, 2), name="colour")


def written(folder, classes=CLASSES, beside=NAMES):
    np.save(folder / "classes.npy", classes)
    if beside is not None:
        (folder / "classes.json").write_text(json.dumps(beside))
    return folder / "classes.npy"


def test_nearest_class_in_cosine(tmp_path, encoder):
    said = {"names": NAMES, "logit_scale": 10.0, "bias": [0.0, 0.0, 1.0, 0.0]}
    probe = load_probe(written(tmp_path, beside=said), encoder)
    images = np.ones((2, 2, 2, 3), np.float32) * [[[[0.3, 0.4, 0.0]]], [[[0.1, 0.0, 0.9]]]]
    images = images.astype(np.float32)
    colours = images[:, 0, 0] / np.linalg.norm(images[:, 0, 0], axis=1, keepdims=True)
    want = 10 * colours @ CLASSES.T + [0, 0, 1, 0]
    np.testing.assert_allclose(probe(images), want, rtol=1e-5, atol=1e-5)
    assert [probe.class_names[i] for i in np.argmax(want, 1)] == ["lime", "blue"]


@pytest.mark.parametrize(
    "classes, beside, message",
    [
        (CLASSES[:, :2], NAMES, "dimension 3"),
        (CLASSES * 2, NAMES, "row 0 has length 2"),
        (CLASSES * np.nan, NAMES, "length nan"),
        (CLASSES[:1], NAMES, "K >= 2"),
        (CLASSES.astype(int), NAMES, "floating-point"),
        (CLASSES, None, "names in"),
        (CLASSES, NAMES[:3], "4 different names"),
        (CLASSES, ["a"] * 4, "1 of them different"),
        (CLASSES, {"names": NAMES, "scale": 1}, "names, logit_scale and bias"),
        (CLASSES, {"names": NAMES, "logit_scale": -1}, "logit_scale > 0"),
        (CLASSES, {"names": NAMES, "bias": [1, 2]}, "one bias or 4"),
        (CLASSES, {"names": NAMES, "bias": "much"}, "finite number"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, encoder, classes, beside, message):
    with pytest.raises(UserError, match=message):
        load_probe(written(tmp_path, classes, beside), encoder)


def test_no_pickle_is_read(tmp_path, encoder):
    np.save(tmp_path / "classes.npy", np.array([{}, {}], object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        load_probe(tmp_path / "classes.npy", encoder)
    with pytest.raises(UserError, match="no class embeddings"):
        load_probe(tmp_path / "other.npy", encoder)
