"""Attacks on encoders whose gradients, losses or representations fail, and bad arguments."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax import attacks
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError

SIZE = (8, 6)
RNG = np.random.default_rng(0)
WEIGHT = jnp.asarray(RNG.standard_normal((48, 8)), jnp.float32)
KEY = jax.random.key(0)


def patches_of(images):
    """(B,12,12): patches of 2 x 2 pixels."""
    x = images.reshape(len(images), 4, 2, 3, 2, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), 12, 12)


def normalised_patches(weight, images):
    """The largest |z| of each patch, z = (x - mean) / max(sqrt(var), 1e-3), times the weight.

    sqrt has an infinite slope at 0, which the maximum multiplies by 0: in a patch of one colour
    the gradient is NaN, and the representation is not.
    """
    patches = patches_of(images)
    mean = patches.mean(-1, keepdims=True)
    deviation = jnp.maximum(jnp.sqrt(jnp.mean((patches - mean) ** 2, -1, keepdims=True)), 1e-3)
    z = (patches - mean) / deviation
    return jnp.tanh(z[..., :4].reshape(len(images), -1)) @ weight


NORMALISED = from_fn(normalised_patches, WEIGHT, input_size=SIZE)


def barred_images(count=4):
    images = RNG.random((count, *SIZE, 3), np.float32)
    images[:, :2] = 0.0  # a black bar of three patches
    return jnp.asarray(images)


def twin(images, start, eps, step_size, num_steps):
    """linf PGD in NumPy by finite differences in float64; a patch of one colour is flat."""
    weight = np.asarray(WEIGHT, np.float64)

    def represent(x):
        patches = patches_of(x)
        mean = patches.mean(-1, keepdims=True)
        deviation = np.maximum(np.sqrt(np.mean((patches - mean) ** 2, -1, keepdims=True)), 1e-3)
        flat = np.ptp(patches, axis=-1, keepdims=True) == 0
        z = np.where(flat, 0.0, (patches - mean) / deviation)
        return np.tanh(z[..., :4].reshape(len(x), -1)) @ weight

    images, x = np.asarray(images, np.float64), np.asarray(start, np.float64)
    clean, pixels = represent(images), np.prod(images.shape[1:])
    objective = lambda x: ((represent(x) - clean) ** 2).sum(1)
    for _ in range(num_steps):
        gradient = np.zeros((len(x), pixels))
        one_colour = np.ptp(patches_of(x), axis=-1) == 0
        for pixel in range(pixels):
            step = np.zeros(pixels)
            step[pixel] = 1e-6
            step = step.reshape(images.shape[1:])
            gradient[:, pixel] = (objective(x + step) - objective(x - step)) / 2e-6
        gradient = gradient.reshape(x.shape)
        rows = one_colour.reshape(len(x), 4, 1, 3, 1, 1) * np.ones((1, 1, 2, 1, 2, 3))
        gradient[rows.reshape(x.shape) == 1] = 0.0
        x = np.clip(x + step_size * np.sign(gradient), images - eps, images + eps).clip(0, 1)
    return x, objective(x)


def test_nan_gradients_count_as_zero_and_are_counted():
    images = barred_images()
    noise = jnp.asarray(RNG.uniform(-0.03, 0.03, (4, 6, 6, 3)), jnp.float32)
    start = images.at[:, 2:].add(noise).clip(0, 1)  # the bars stay black
    config = attacks.AttackConfig(eps=0.05, step_size=0.02, num_steps=2)
    result = attacks.u_pgd(NORMALISED, images, KEY, config=config, start=start)
    expected, objective = twin(images, start, 0.05, 0.02, 2)
    assert np.isfinite(result.images).all() and np.isfinite(result.representations).all()
    np.testing.assert_allclose(result.objective, objective, rtol=1e-3)
    assert np.mean(np.abs(result.images - expected) > 1e-4) < 0.02  # a sign of a tiny gradient
    np.testing.assert_array_equal(result.health.bad_gradients, 2 * 3 * 12)  # steps, patches, pixels
    np.testing.assert_array_equal(result.health.zero_gradients, 0)


@pytest.mark.parametrize("norm, eps, num_restarts", [("linf", 0.05, 1), ("l2", 0.3, 4)])
def test_attacked_images_are_finite_whatever_the_gradient(norm, eps, num_restarts):
    images = barred_images()
    config = attacks.AttackConfig(
        eps=eps, step_size=0.02, num_steps=3, norm=norm, num_restarts=num_restarts
    )
    targets = NORMALISED(barred_images())
    for target in (None, targets):
        result = attacks.u_pgd(NORMALISED, images, KEY, config=config, target=target)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))
    moves = lambda params, x: jnp.sum(jnp.sqrt(jnp.maximum(x - 0.5, 0.0)), (1, 2, 3))
    result = attacks.loss_pgd(moves, None, images, KEY, config=config)
    assert np.isfinite(result.images).all() and np.all(result.health.bad_gradients > 0)


def pole(params, images):
    """Infinite from 0.6 on in the first pixel, finite before."""
    x = images.reshape(len(images), -1)
    return jnp.stack([params / jnp.maximum(0.6 - x[:, 0], 0.0), x[:, 1]], axis=1)


def test_an_infinite_representation_is_the_worst():
    images = jnp.full((2, *SIZE, 3), 0.5).at[1, 0, 0, 0].set(0.1)
    encoder = from_fn(pole, jnp.float32(1.0), input_size=SIZE)
    config = attacks.AttackConfig(eps=0.2, step_size=0.15, num_steps=4, num_restarts=3)
    result = attacks.u_pgd(encoder, images, KEY, config=config)
    assert np.isfinite(result.images).all()
    np.testing.assert_array_equal(np.isposinf(result.objective), [True, False])
    np.testing.assert_array_equal(np.isposinf(result.history.dist_l2[:, -1]), [True, False])
    assert np.isfinite(result.objective[1]) and result.health.bad_gradients[0] > 0


def sometimes_nan(params, images):
    """NaN where the mean is above that of the originals, else the pixels' sums."""
    total = images.mean((1, 2, 3))
    far = jnp.where(total > params, jnp.nan, 1.0)
    return jnp.stack([total, images[:, 0].sum((1, 2))], axis=1) * far[:, None]


def test_a_nan_restart_is_replaced_by_a_finite_one_and_counted():
    images = jnp.full((8, *SIZE, 3), 0.5)
    encoder = from_fn(sometimes_nan, jnp.float32(0.5), input_size=SIZE)
    config = attacks.AttackConfig(eps=0.1, step_size=1e-4, num_steps=1, num_restarts=8)
    result = attacks.u_pgd(encoder, images, KEY, config=config)
    once = attacks.u_pgd(encoder, images, KEY, config=dataclasses.replace(config, num_restarts=1))
    assert np.isnan(once.objective).any()
    assert np.isfinite(result.objective).all() and np.isfinite(result.representations).all()
    counts = np.asarray(result.health.nan_ends)
    assert np.all((counts >= 0) & (counts < 8)) and counts.sum() > 8
    assert np.all(np.asarray(once.health.nan_ends) == np.isnan(once.objective))


def test_zero_gradients_are_counted():
    """An encoder that rounds its pixels to 8 bits has none, anywhere."""
    rounding = from_fn(
        lambda w, x: jnp.round(x * 255).reshape(len(x), -1)[:, :48] @ w, WEIGHT, input_size=SIZE
    )
    images, config = barred_images(), attacks.AttackConfig(num_steps=5, num_restarts=2)
    result = attacks.u_pgd(rounding, images, KEY, config=config)
    np.testing.assert_array_equal(result.health.zero_gradients, 10)
    start = attacks.random_start(images, jax.random.fold_in(KEY, 0), config=config)
    assert np.abs(result.images - images).max() > 0 and start.shape == images.shape
    plain = from_fn(lambda w, x: x.reshape(len(x), -1)[:, :48] @ w, WEIGHT, input_size=SIZE)
    health = attacks.u_pgd(plain, images, KEY, config=config).health
    assert not any(np.any(x) for x in health)


GOOD = jnp.full((2, *SIZE, 3), 0.5)
CONFIG = attacks.AttackConfig(eps=0.1, step_size=0.02, num_steps=2)
BAD_IMAGES = {
    "pixels 0..255": (GOOD * 255, "divide by 255"),
    "pixels -1..1": (GOOD * 2 - 1.5, r"in \[0,1\]"),
    "NaN": (GOOD.at[0, 0, 0, 0].set(jnp.nan), "NaN"),
    "uint8": (np.zeros(GOOD.shape, np.uint8), "uint8.* / 255"),
    "bfloat16": (GOOD.astype(jnp.bfloat16), "bfloat16"),
    "one image": (GOOD[0], r"\(B,"),
    "no image": (GOOD[:0], "at least one"),
    "a list": ([0.5], "array"),
}


def _summed_loss(params, images):
    return jnp.sum(images, (1, 2, 3))


CALLS = {
    "u_pgd": lambda images, key, config: attacks.u_pgd(NORMALISED, images, key, config=config),
    "loss_pgd": lambda images, key, config: attacks.loss_pgd(
        _summed_loss, None, images, key, config=config
    ),
    "random_start": lambda images, key, config: attacks.random_start(images, key, config=config),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_one_gate_for_images_keys_and_configs(call):
    for images, message in BAD_IMAGES.values():
        with pytest.raises(UserError, match=message):
            call(images, KEY, CONFIG)
    for key in (jax.random.PRNGKey(0), 0, jax.random.split(KEY, 3), None):
        with pytest.raises(UserError, match="typed key|one for each of 2 images"):
            call(GOOD, key, CONFIG)
    for config in (None, {"eps": 0.1}, attacks.AttackConfig):
        with pytest.raises(UserError, match="AttackConfig"):
            call(GOOD, KEY, config)
    huge = attacks.AttackConfig(eps=13.0, step_size=1.0, norm="l2")
    with pytest.raises(UserError, match="largest distance between two"):
        call(GOOD, KEY, huge)


@pytest.mark.parametrize("images, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_projecting_and_stepping_once_have_the_same_gate(images, message):
    with pytest.raises(UserError, match=message):
        attacks.project(GOOD, images, eps=0.1, norm="linf")
    with pytest.raises(UserError, match=message):
        attacks.u_fgsm(NORMALISED, images, KEY, eps=0.1)


@pytest.mark.parametrize(
    "loss", [lambda p, x: x.mean(), lambda p, x: x[:, 0, 0], lambda p, x: None], ids="mxn"
)
def test_a_loss_that_is_not_one_for_each_image(loss):
    with pytest.raises(UserError, match=r"losses \(2,\) float32, one for each image"):
        attacks.loss_pgd(loss, None, GOOD, KEY, config=CONFIG)


@pytest.mark.parametrize(
    "change",
    [{"eps": 8}, {"eps": "8/255"}, {"step_size": 2.0}, {"num_steps": 2.5}, {"num_steps": True},
     {"num_restarts": 0}, {"random_start": "no"}, {"rule": "apdg"}, {"objective": "l3"},
     {"norm": None}],
    ids=str,
)  # fmt: skip
def test_settings_without_sense(change):
    with pytest.raises(UserError, match=next(iter(change))):
        attacks.AttackConfig(**change)
