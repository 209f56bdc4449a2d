"""Integer noise: its distribution to the last bit, and the attack that float noise fails."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ur_jax.certify import Classifier, RandomizedConfig, certify, noise
from ur_jax.certify.sampling import noisy_samples
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError

SHAPE = (4, 4, 3)


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


@pytest.mark.parametrize("sigma", [0.02, 0.25, 1.0])
def test_thresholds_are_the_gaussians(sigma):
    tables = noise.grid_noise(sigma)
    thresholds = [int(h) * 2**32 + int(low) for h, low in zip(tables.high, tables.low)]
    expected = 2 * stats.norm.sf((np.arange(255) + 0.5) / (255 * sigma))
    np.testing.assert_allclose(np.array(thresholds, float) / 2**63, expected, rtol=1e-9, atol=1e-18)
    assert thresholds == sorted(thresholds, reverse=True) and thresholds[0] < 2**63


@pytest.mark.parametrize("sigma", [0.02, 0.12, 0.25, 2.0])
def test_the_short_way_gives_what_all_bits_give(sigma):
    tables = noise.grid_noise(sigma)
    by_all_bits = tables._replace(cells=np.full_like(tables.cells, 2**32 - 1))
    drawn, expected = (
        np.asarray(noise.integer_noise(keys(16, 1), SHAPE, t)) for t in (tables, by_all_bits)
    )
    np.testing.assert_array_equal(drawn, expected)
    assert np.abs(drawn).max() > 2


def test_the_first_word_by_hand():
    """Every first word around every threshold, against a comparison in plain integers."""
    tables = noise.grid_noise(0.25)
    words = np.unique(np.clip(tables.high[:, None].astype(np.int64) + [-1, 1], 0, 2**31 - 1))
    words = np.setdiff1d(words, tables.high)
    cell = tables.cells[np.asarray(noise._cell(jnp.asarray(words, jnp.uint32), len(tables.cells)))]
    count = (cell >> 23) + ((words & noise._EDGE) < (cell & noise._EDGE))
    np.testing.assert_array_equal(count, (words[:, None] < tables.high.astype(np.int64)).sum(1))


def test_it_is_rounded_clipped_and_of_its_own_key_alone():
    tables = noise.grid_noise(0.25)
    levels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3))
    images = jnp.asarray(levels / 255, jnp.float32)
    drawn = np.asarray(noise.grid_samples(images, keys(64), tables))
    assert set(drawn.ravel()) <= set((np.arange(256) / 255).astype(np.float32))
    assert drawn.min() == 0.0 and drawn.max() == 1.0
    alone = noise.grid_samples(images[5:7], keys(64)[5:7], tables)
    np.testing.assert_array_equal(alone, drawn[5:7])
    both = np.asarray(noise.integer_noise(keys(64), (8, 8, 3), tables)).ravel()
    expected = stats.norm.cdf((np.array([-63, 0, 64]) - 0.5) / 63.75)
    found = [(both < edge).mean() for edge in (-63, 0, 64)]
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / np.sqrt(both.size))
    assert noise.total_variation(224 * 224 * 3, 1) < 3e-12
    with pytest.raises(UserError, match="256 grey values"):
        noise.check_grid(np.full(SHAPE, 0.3, np.float32))


def test_an_encoder_built_to_tell_float_noise_defeats_it_and_not_the_grids():
    """Class 0 iff every value is one that the noise about x can give. Voracek and Hein (2023)."""
    sigma, x, other = 0.25, np.float32(128 / 255), np.float32(128 / 255 + 0.0123)
    bits = (np.arange(2**23, dtype=np.uint32) | np.uint32(0x3F800000)).view(np.float32) - 1
    low = np.nextafter(np.float32(-1), np.float32(0))
    z = jnp.sqrt(2.0) * jax.lax.erf_inv(jnp.maximum(low, bits * (1 - low) + low))
    drawn = jnp.sort(x + jnp.clip(sigma * z, -1e30, 1e30))
    given = {"float": drawn, "grid": jnp.asarray(noise._GREY)}

    def is_given(values, images):
        pixels = images.reshape(len(images), -1)
        at = jnp.clip(jnp.searchsorted(values, pixels), 0, len(values) - 1)
        known = (values[at] == pixels).all(axis=1)
        return jnp.stack([known, ~known], axis=1).astype(jnp.float32)

    def run(kind):
        encoder = from_fn(is_given, given[kind], input_size=SHAPE[:2])
        classify = Classifier(encoder, jnp.eye(2), jnp.zeros(2))
        config = RandomizedConfig(sigma=sigma, n=1000, noise=kind, clip=False)
        found = certify(classify, np.full(SHAPE, x), jax.random.key(0), config=config)
        moved = jnp.full((64, *SHAPE), np.round(other * 255) / 255 if kind == "grid" else other)
        ones = jnp.zeros(64, jnp.int32)
        noisy = noisy_samples(
            moved, jax.random.key(1), ones, jnp.arange(64), sigma=sigma, clip=False, noise=kind
        )
        return found, np.asarray(is_given(given[kind], noisy)).mean(axis=0)[0]

    distance = float(other - x) * np.sqrt(48)
    certificate, still = run("float")
    assert certificate.predicted == 0 and certificate.radius > 5 * distance and still < 0.01
    certificate, still = run("grid")
    assert certificate.predicted == 0 and certificate.radius > 5 * distance and still == 1.0


def test_the_forward_pass_of_this_platform_does_not_depend_on_the_place_in_the_batch():
    from ur_jax.encoders import loading

    encoder = loading.load_encoder("demo")
    images = np.random.default_rng(0).random((16, 32, 32, 3)).astype(np.float32)
    forward = jax.jit(lambda encoder, images: encoder(images))
    expected = np.asarray(forward(encoder, images))
    for shift in (1, 5, 11):
        found = np.asarray(forward(encoder, np.roll(images, shift, axis=0)))
        np.testing.assert_array_equal(np.roll(found, -shift, axis=0), expected)
