"""The readings of an impersonation's attack, on a linear encoder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.attacks import AttackConfig, u_pgd
from ur_jax.attacks.impersonation import ImpersonationConfig, attack
from ur_jax.encoders import from_fn

SIZE = (4, 4)
ULP = 2.0**-23


def mean_brightness(params, images):
    """f(x) = mean of x: a perturbation of linf norm eps moves it by eps, and by no more."""
    return images.mean((1, 2, 3))[:, None] * params


ENCODER = from_fn(mean_brightness, jnp.ones(1), input_size=SIZE, name="brightness")


def test_the_moving_ball_exceeds_eps_and_ours_is_one_u_pgd():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(0.4, 0.6, (2, *SIZE, 3)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), 2)
    target = jnp.array([[0.9], [0.1]])
    settings = ImpersonationConfig(eps=0.1, step_size=0.03, read_at=(2, 3, 10))
    reads = list(attack(ENCODER, images, keys, target, config=settings))
    whole = u_pgd(
        ENCODER, images, keys, target=target,
        config=AttackConfig(eps=0.1, step_size=0.03, num_steps=10),
    )  # fmt: skip
    np.testing.assert_allclose(reads[-1], whole.images, atol=ULP)
    # Distances before a step of the one run are those of the readings.
    for step, attacked in zip(settings.read_at[:2], reads):
        left = np.abs(ENCODER(attacked) - target)[:, 0]
        np.testing.assert_allclose(left, whole.history.dist_l2[:, step], atol=1e-6)
        assert np.abs(attacked - images).max() <= 0.1 + ULP
    moving = dataclasses.replace(settings, moving_ball=True)
    reads = list(attack(ENCODER, images, keys, target, config=moving))
    assert np.abs(reads[0] - images).max() <= 0.1 + ULP
    assert np.abs(reads[2] - images).max() > 0.11
    for before, after in zip(reads, reads[1:]):
        assert np.abs(after - before).max() <= 0.1 + ULP


def test_other_rules_read_an_attack_of_its_own_at_every_step():
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.uniform(0.4, 0.6, (2, *SIZE, 3)).astype(np.float32))
    keys, target = jax.random.split(jax.random.key(0), 2), jnp.array([[0.9], [0.1]])
    settings = ImpersonationConfig(eps=0.1, read_at=(1, 3), rule="apgd")
    first, second = attack(ENCODER, images, keys, target, config=settings)
    alone = u_pgd(
        ENCODER, images, keys, target=target, config=AttackConfig(0.1, num_steps=3, rule="apgd")
    )
    np.testing.assert_array_equal(second, alone.images)
    for attacked in (first, second):  # a step of 2 eps reaches the face of the ball at once
        np.testing.assert_allclose(np.abs(attacked - images), 0.1, atol=ULP)


def test_bad_settings():
    with pytest.raises(ValueError, match="one start with a moving ball"):
        ImpersonationConfig(rule="apgd", moving_ball=True)
    with pytest.raises(ValueError, match="objective with a target"):
        ImpersonationConfig(objective="neighbour")
    for read_at in ((), (0, 1), (3, 3)):
        with pytest.raises(ValueError, match="increasing read_at"):
            ImpersonationConfig(read_at=read_at)
