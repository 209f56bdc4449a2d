"""Random encoders, one perturbation for all, patches, several encoders: against closed forms."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax import attacks
from ur_jax.encoders import from_fn

SIZE = (6, 5)
RNG = np.random.default_rng(0)
WEIGHT = RNG.random((90, 4)).astype(np.float32)  # all >= 0: pixels move together
IMAGES = jnp.asarray(0.3 + 0.4 * RNG.random((5, *SIZE, 3)), jnp.float32)
KEY = jax.random.key(0)


def linear(weight, images):
    return images.reshape(len(images), -1) @ weight


ENCODER = from_fn(linear, jnp.asarray(WEIGHT), input_size=SIZE)


def random_pixels(weight, images, keys):
    """Each pixel is seen with probability 0.95: so much of the representation, in the mean."""
    draw = lambda key: jax.random.bernoulli(key, 0.95, (*SIZE, 3))
    return linear(weight, jnp.where(jax.vmap(draw)(keys), images, 0.0))


def test_the_expectation_of_a_random_encoder_is_attacked():
    eps = 0.05
    config = attacks.AttackConfig(eps=eps, num_steps=8, rule="apgd")
    run = lambda images, keys: attacks.eot_pgd(
        random_pixels, ENCODER.params, images, keys, config=config, num_samples=4
    )
    keys = attacks.image_keys(KEY, 5)
    result = run(IMAGES, keys)
    delta = np.asarray(result.images - IMAGES)
    assert np.abs(delta).max() <= eps + 1e-7
    # Every pixel raises every entry: the expected optimum is at one of the two corners.
    optimum = 0.95 * eps * np.linalg.norm(WEIGHT.sum(0))
    reached = np.linalg.norm(0.95 * delta.reshape(5, -1) @ WEIGHT, axis=1)
    assert np.all(reached > 0.7 * optimum) and np.all(reached <= 1.0001 * optimum)
    # The mean over 32 draws is 0.95 of W x, to 5 of its standard deviations.
    x = np.asarray(result.images).reshape(5, -1)
    sigma = np.sqrt((x**2) @ (WEIGHT**2) * 0.95 * 0.05 / 32)
    assert np.all(np.abs(result.representations - 0.95 * x @ WEIGHT) < 5 * sigma)
    single = run(IMAGES[2:3], keys[2:3])  # an image's draws are its own
    np.testing.assert_allclose(single.images[0], result.images[2], atol=1e-6)
    brighter = functools.partial(attacks.apply_transformed, transform=_brighter)
    seen = attacks.eot_pgd(brighter, ENCODER, IMAGES, KEY, config=config, num_samples=1)
    assert np.all(np.abs(seen.images - IMAGES) <= eps + 1e-7)
    with pytest.raises(ValueError, match=r"\(B,D\) float32"):
        attacks.eot_pgd(_no_representation, None, IMAGES, KEY, config=config)


def test_no_lucky_draw_is_kept_for_a_good_point():
    """Of noise alone, every point is as good as every other one, whatever a step draws."""
    config = attacks.AttackConfig(eps=0.05, num_steps=6, rule="apgd", num_restarts=2)
    result = attacks.eot_pgd(_only_noise, None, IMAGES, KEY, config=config, num_samples=2)
    assert np.all(np.ptp(result.history.objective, axis=1) == 0)
    np.testing.assert_array_equal(result.objective, result.history.objective[:, 0])
    assert np.ptp(result.objective) > 0.1  # each image has draws of its own


def _only_noise(params, images, keys):
    return jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)


def _brighter(image, key):
    return image * jax.random.uniform(key, (), minval=0.8, maxval=1.2)


def _no_representation(params, images, keys):
    return images


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.5)])
def test_one_perturbation_for_all_moves_images_that_it_never_saw(norm, eps):
    config = attacks.AttackConfig(eps=eps, step_size=eps / 2, norm=norm)
    stream = [IMAGES[:2], IMAGES[1:3]] * 30
    delta = attacks.universal_perturbation(ENCODER, stream, KEY, config=config)
    others = IMAGES[3:]
    moved = ENCODER(attacks.perturbed(others, delta)) - ENCODER(others)
    optimum = {
        "linf": eps * np.linalg.norm(WEIGHT.sum(0)),
        "l2": eps * np.linalg.svd(WEIGHT, compute_uv=False)[0],
    }[norm]
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), optimum, rtol=5e-3)
    size = np.abs(delta).max() if norm == "linf" else np.linalg.norm(delta)
    assert size <= eps * (1 + 1e-6)
    with pytest.raises(ValueError, match="at least one batch"):
        attacks.universal_perturbation(ENCODER, [], KEY, config=config)


@pytest.mark.parametrize("shape, place", [("rectangle", (1, 2)), ("ellipse", None)])
def test_a_patch_changes_its_pixels_only_and_finds_their_best(shape, place):
    config = attacks.PatchConfig(height=3, width=2, place=place, shape=shape, num_steps=20)
    result = attacks.patch_attack(ENCODER, IMAGES, KEY, config=config)
    mask = np.asarray(attacks.patch_mask(attacks.image_keys(KEY, 5), SIZE, config))
    outside = ~np.broadcast_to(mask, IMAGES.shape)
    np.testing.assert_array_equal(result.images[outside], IMAGES[outside])
    sizes = mask.sum((1, 2, 3))
    assert np.all(sizes == 6) if shape == "rectangle" else np.all((sizes >= 2) & (sizes <= 6))
    if place:
        assert mask[:, 1:4, 2:4].all()
    both = []
    for value in (0.0, 1.0):  # every pixel raises every entry
        painted = np.where(mask, value, IMAGES).reshape(5, -1)
        both.append(np.linalg.norm((painted - np.reshape(IMAGES, (5, -1))) @ WEIGHT, axis=1))
    found = np.sqrt(np.asarray(result.objective))
    at_one_end = np.abs(found / np.stack(both) - 1).min(0)  # each is a maximum
    assert np.all(at_one_end < 1e-3)
    with pytest.raises(ValueError, match="inside 6 x 5"):
        attacks.patch_attack(ENCODER, IMAGES, KEY, config=attacks.PatchConfig(height=7, width=2))


def test_what_is_made_on_one_encoder_is_measured_on_another_and_an_ensemble_is_attacked():
    first, second = np.zeros((90, 2), np.float32), np.zeros((90, 2), np.float32)
    first[:45], second[45:] = RNG.random((45, 2)), RNG.random((45, 2))
    encoders = {
        name: from_fn(linear, jnp.asarray(weight), input_size=SIZE)
        for name, weight in (("first", first), ("second", second))
    }
    config = attacks.AttackConfig(eps=0.05, num_steps=10, rule="apgd")
    found = attacks.transfer_matrix(encoders, IMAGES, KEY, config=config)
    best = {n: 0.05 * np.linalg.norm(w.sum(0)) for n, w in (("first", first), ("second", second))}
    for name, other in (("first", "second"), ("second", "first")):
        np.testing.assert_allclose(found[name][name], best[name], rtol=1e-3)
        assert np.all(found[name][other] < 0.6 * best[other])  # it looks at other pixels
    both = attacks.ensemble(tuple(encoders.values()), (2.0, 4.0))
    assert both.dimension == 4
    result = attacks.u_pgd(both, IMAGES, KEY, config=config)
    optimum = (best["first"] / 2) ** 2 + (best["second"] / 4) ** 2
    np.testing.assert_allclose(result.objective, optimum, rtol=2e-3)
    with pytest.raises(ValueError, match="scale > 0 for each of 2"):
        attacks.ensemble(tuple(encoders.values()), (1.0, 0.0))
    other = from_fn(linear, jnp.asarray(WEIGHT[:27]), input_size=(3, 3))
    with pytest.raises(ValueError, match="one input size"):
        attacks.ensemble((ENCODER, other), (1.0, 1.0))
