"""The worst of several attacks: at least every member on every image; what it asks for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax import attacks
from ur_jax.encoders import from_fn

SIZE = (6, 5)
RNG = np.random.default_rng(0)
WEIGHT = jnp.asarray(RNG.normal(size=(90, 6)), jnp.float32)
IMAGES = jnp.asarray(RNG.random((4, *SIZE, 3)), jnp.float32)
KEY = jax.random.key(0)


def bent(weight, images):
    return jnp.tanh(images.reshape(len(images), -1) @ weight)


ENCODER = from_fn(bent, WEIGHT, input_size=SIZE)


def test_it_is_the_worst_of_its_members_on_every_image():
    config = attacks.StrongConfig(eps=0.05, budget=4, num_restarts=2)
    found = attacks.strong(ENCODER, IMAGES, KEY, config=config)
    assert [name for name, _ in config.runs] == sorted(
        [name for name in config.members for _ in range(2)], key=list(config.members).index
    )
    np.testing.assert_array_equal(found.distance, found.distances.max(1))
    np.testing.assert_array_equal(found.run, found.distances.argmax(1))
    for i, run in enumerate(np.asarray(found.run)):
        np.testing.assert_array_equal(found.representations[i], found.each[i, run])
    moved = np.linalg.norm(found.each - ENCODER(IMAGES)[:, None], axis=2)
    np.testing.assert_allclose(found.distances, moved, rtol=1e-5)
    np.testing.assert_allclose(ENCODER(found.images), found.representations, atol=1e-5)
    assert np.abs(found.images - IMAGES).max() <= 0.05 + 6e-8
    # A member alone, with the same keys, is what is in its columns.
    fold = jax.vmap(jax.random.fold_in, (0, None))
    keys = fold(fold(attacks.image_keys(KEY, 4), 1), 1)
    alone = attacks.u_pgd(ENCODER, IMAGES, keys, config=config.members["apgd-cosine"])
    np.testing.assert_allclose(found.each[:, 3], alone.representations, atol=1e-5)
    assert found.growth.shape == (4, 8) and not found.zero_gradients.any()


def test_what_it_needs_is_asked_for():
    config = attacks.StrongConfig(budget=1)
    assert "square" not in attacks.StrongConfig(norm="l2").members
    assert config.forward_passes == 3 * (3 * 3 * 2 + 11)
    with pytest.raises(ValueError, match=r"targets \(num_restarts,1,D\)"):
        attacks.strong(ENCODER, IMAGES[:1], KEY, config=config)
    with pytest.raises(ValueError, match=r"targets \(3,4,6\)"):
        attacks.strong(ENCODER, IMAGES, KEY, config=config, targets=jnp.zeros((4, 6)))
    with pytest.raises(ValueError, match="with_bank"):
        attacks.strong(ENCODER, IMAGES, KEY, config=config, bank=jnp.zeros((4, 6)))
    for change in ({"eps": 2.0}, {"budget": 0}, {"num_restarts": 0}, {"norm": "l3"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            attacks.StrongConfig(**change)
