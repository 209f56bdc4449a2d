"""The batch size follows the memory, of a forward pass and of an attack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ur_jax
from ur_jax.devices.memory import fit_batch_size

SHAPE = (8, 8, 3)
IMAGE_BYTES = 8 * 8 * 3 * 4


@pytest.fixture(scope="module")
def encoder():
    weights = np.random.default_rng(0).standard_normal((192, 4), np.float32)
    apply_fn = lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params)
    return ur_jax.from_fn(apply_fn, weights, input_size=SHAPE[:2])


def attack(encoder, images):
    config = ur_jax.AttackConfig(num_steps=2)
    return ur_jax.u_pgd(encoder, images, jax.random.key(0), config=config)


@pytest.mark.parametrize("fn, least", [(lambda encoder, x: encoder(x), 1), (attack, 3)])
def test_the_largest_that_fits(encoder, fn, least):
    """An attack holds at least the images, the attacked ones and the gradient."""
    assert fit_batch_size(fn, encoder, SHAPE, largest=256, memory=2**30) == 256
    memory = 2**14
    size = fit_batch_size(fn, encoder, SHAPE, largest=256, memory=memory)
    assert 1 <= size <= 0.6 * memory / IMAGE_BYTES / least
    with pytest.raises(ValueError, match="bfloat16"):
        fit_batch_size(fn, encoder, SHAPE, largest=256, memory=100)


def test_no_batch_beyond_what_there_are_images_for_is_compiled(encoder):
    sizes = []

    def fn(encoder, images):
        sizes.append(len(images))
        return encoder(images)

    memory = 2**30
    assert fit_batch_size(fn, encoder, SHAPE, largest=256, num_images=33, memory=memory) == 64
    assert fit_batch_size(fn, encoder, SHAPE, largest=4, num_images=33, memory=memory) == 4
    assert fit_batch_size(fn, encoder, SHAPE, largest=256, num_images=1, memory=memory) == 1
    assert sizes == [64, 4, 1]
