"""Another output of an encoder, with the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ur_jax
from ur_jax.encoders import from_fn
from ur_jax.encoders.outputs import with_representation

SIZE = (8, 8)


def mean_colour(params, images):
    """Twice the mean of each channel, and a fourth feature that says nothing."""
    return jnp.concatenate([images.mean((1, 2)), images[:, 0, 0, :1]], axis=1) * params


@pytest.fixture
def encoder():
    return from_fn(mean_colour, jnp.full(4, 2.0), input_size=SIZE, name="tiny")


def test_another_output_is_the_encoder_loaded_with_it():
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    backbone = ur_jax.load_encoder("demo", representation="backbone")
    for name in ("projection", "features", "paper"):
        other = with_representation(backbone, name)
        loaded = ur_jax.load_encoder("demo", representation=name)
        assert other.dimension == loaded.dimension and other.representation == name
        assert other.apply_fn == loaded.apply_fn
        assert jax.tree.leaves(other.params)[0] is jax.tree.leaves(backbone.params)[0]
        np.testing.assert_array_equal(other(images), loaded(images))
    with pytest.raises(ValueError, match="Unknown representation 'projektion'.*'projection'"):
        with_representation(backbone, "projektion")


def test_an_encoder_of_ones_own(encoder, tmp_path, monkeypatch):
    assert with_representation(encoder, "features") is encoder
    with pytest.raises(ValueError, match="'tiny' gives one representation, 'paper', got 'hidden'"):
        with_representation(encoder, "hidden")
    (tmp_path / "two_outputs.py").write_text(
        "import jax.numpy as jnp, ur_jax\n"
        "def shallow(w, x): return x.mean((1, 2)) * w\n"
        "def deep(w, x): return shallow(w, x)[:, :2]\n"
        "def make(representation='paper', scale=1.0):\n"
        "    fn = shallow if representation == 'hidden' else deep\n"
        "    return ur_jax.from_fn(fn, jnp.full(3, scale), input_size=(8, 8), name='two',\n"
        "                          representation=representation)\n"
    )
    made = ur_jax.load_encoder(f"{tmp_path}/two_outputs.py:make,scale=2.0")
    trained = made.replace(params=made.params * 3)
    hidden = with_representation(trained, "hidden")
    assert (hidden.dimension, hidden.representation, made.dimension) == (3, "hidden", 2)
    np.testing.assert_array_equal(hidden(jnp.ones((1, 8, 8, 3))), [[6.0, 6.0, 6.0]])
    assert with_representation(made, "features") is made
    back = with_representation(hidden, "features")
    assert back.dimension == 2 and back.params is hidden.params
