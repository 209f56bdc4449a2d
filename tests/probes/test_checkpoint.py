"""A probe on disk knows its encoder, and the names of its classes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import ur_jax
from ur_jax.encoders import checkpoints, from_fn
from ur_jax.probes.checkpoint import identified, load_probe, restore_probe, save_probe

SIZE = (8, 8)


def mean_colour(params, images):
    """Twice the mean of each channel, and a fourth feature that says nothing."""
    return jnp.concatenate([images.mean((1, 2)), images[:, 0, 0, :1]], axis=1) * params


@pytest.fixture
def encoder():
    return from_fn(mean_colour, jnp.full(4, 2.0), input_size=SIZE, name="tiny")


def test_a_probe_knows_its_encoder(encoder, tmp_path):
    trained = {"kernel": np.ones((4, 3), np.float32), "bias": np.zeros(3, np.float32)}
    save_probe(tmp_path / "probe", trained, encoder, {"class_names": ["a", "b", "c"]})
    loaded = load_probe(tmp_path / "probe", encoder)
    np.testing.assert_array_equal(loaded.kernel, trained["kernel"])
    np.testing.assert_array_equal(loaded(jnp.ones((1, *SIZE, 3))), np.full((1, 3), 8.0))
    # A record tells apart probes of other weights, and of the same weights in another order.
    names = [
        loaded,
        loaded.replace(class_names=("b", "a", "c")),
        loaded.replace(bias=loaded.bias + 1),
    ]
    assert loaded.class_names == ("a", "b", "c")
    assert len({tuple(identified(probe).items()) for probe in names}) == 3
    # The same weights in bfloat16 are the same encoder.
    weights = jnp.full(4, 2.0).at[1].set(1.2345)
    small = from_fn(mean_colour, weights, input_size=SIZE, dtype="bfloat16")
    full = from_fn(mean_colour, weights, input_size=SIZE)
    save_probe(tmp_path / "full", trained, full, {})
    restore_probe(tmp_path / "full", small)

    with pytest.raises(ValueError, match="trained on other weights of encoder 'tiny'"):
        load_probe(tmp_path / "probe", full)
    other = encoder.replace(representation="projection")
    with pytest.raises(ValueError, match="reads the representation 'paper'.*got 'projection'"):
        load_probe(tmp_path / "probe", other)
    # Without that record only shapes are compared.
    checkpoints.save_encoder(tmp_path / "bare", trained, {"encoder": "tiny", "config": {}})
    assert restore_probe(tmp_path / "bare", full)[1] == {}


def test_paper_and_features_of_one_output_are_one_representation(tmp_path):
    features, paper = (ur_jax.load_encoder("demo", representation=r) for r in ("features", "paper"))
    trained = {"kernel": np.ones((64, 3), np.float32), "bias": np.zeros(3, np.float32)}
    save_probe(tmp_path / "probe", trained, features, {})
    load_probe(tmp_path / "probe", paper)
    with pytest.raises(ValueError, match="reads the representation 'backbone'"):
        load_probe(tmp_path / "probe", ur_jax.load_encoder("demo", representation="projection"))
