"""Center smoothing on linear encoders, where distances under noise have a known distribution."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ur_jax.certify import CenterConfig, center_smoothing, certify, enclosing, eps_out_from_counts
from ur_jax.certify.enclosing import median_distances
from ur_jax.devices import data_mesh
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("optimised")

CONFIG = CenterConfig(n0=600, n=2000, alpha1=0.05, alpha2=0.01, delta=0.1)


def project(params, images):
    return images.transpose(0, 3, 1, 2).reshape(images.shape[0], -1) @ params


@pytest.fixture(scope="module")
def golden_linear(golden):
    stored = golden("center_smoothing.npz")
    encoder = from_fn(project, stored["weight"].T, input_size=(8, 8))
    return encoder, stored["input"].transpose(1, 2, 0), stored


@pytest.fixture(scope="module")
def isometric():
    """Orthonormal rows: d(z, f(x + noise))^2 / sigma^2 is noncentral chi-square."""
    rng = np.random.default_rng(0)
    weight = np.linalg.qr(rng.standard_normal((48, 8)))[0].astype(np.float32)
    return from_fn(project, weight, input_size=(4, 4)), rng.random((4, 4, 3)).astype(np.float32)


def run(encoder, images, config, seed=0, **rest):
    return dict(center_smoothing(encoder, images, jax.random.key(seed), config=config, **rest))


def test_hoeffding_mode_agrees_with_the_reference(golden_linear):
    encoder, image, stored = golden_linear
    config = CenterConfig(
        sigma=float(stored["sigma"]),
        eps_in=float(stored["eps_in"]),
        n0=int(stored["n_pred"]),
        n=int(stored["n_cert"]),
        bound="hoeffding",
    )
    certificates = run(encoder, [image] * 6, config, batch_size=64).values()
    given = [c for c in certificates if not c.abstained]
    assert 2 <= len(given) <= 6  # the reference abstains on half of the seeds
    eps_out = np.mean([c.eps_out for c in given])
    errors = np.mean([c.smoothing_error for c in given])
    np.testing.assert_allclose(eps_out, stored["eps_out"].mean(), rtol=0.05)
    np.testing.assert_allclose(errors, stored["smoothing_error"].mean(), rtol=0.2)
    assert all(c.eps_out > 0.98 * stored["eps_out_exact_center"] for c in given)
    # The exact bound, on the same samples, is tighter.
    exact = dataclasses.replace(config, bound="exact")
    tighter = run(encoder, [image] * 2, exact, batch_size=64).values()
    for a, b in zip(certificates, tighter):
        assert (a.radius, a.num_in_ball) == (b.radius, b.num_in_ball)
        assert b.abstained or b.eps_out < a.eps_out


@pytest.mark.parametrize("bound", ["exact", "union", "betting"])
def test_eps_out_covers_the_true_quantile_and_approaches_it(isometric, bound):
    encoder, image = isometric
    excess = []
    for n in (300, CONFIG.n) if bound == "exact" else (CONFIG.n,):
        config = dataclasses.replace(CONFIG, bound=bound, n=n, tolerance=0.1)
        ratios = []
        for certificate in run(encoder, [image] * 10, config).values():
            if certificate.abstained:
                continue
            noncentrality = (certificate.smoothing_error / config.sigma) ** 2
            true = config.sigma * math.sqrt(stats.ncx2.ppf(config.level, 8, noncentrality))
            ratios.append(certificate.eps_out / (config.factor * true))
        assert len(ratios) >= 5 and min(ratios) >= 1.0
        excess.append(np.mean(ratios) - 1)
    assert excess == sorted(excess, reverse=True)
    assert excess[-1] < (0.03 if bound == "exact" else config.tolerance)


def test_a_center_nearby_lies_within_eps_out(isometric):
    # Smooths at x' on the sphere of radius eps_in, in the direction that the encoder sees most.
    encoder, image = isometric
    image = 0.4 + 0.2 * image  # so that it stays an image when it is moved
    direction = np.asarray(encoder.params)[:, 0].reshape(3, 4, 4).transpose(1, 2, 0)
    moved = image + np.float32(CONFIG.eps_in) * direction
    here = certify(encoder, image, jax.random.key(0), config=CONFIG)
    there = certify(encoder, moved, jax.random.key(1), config=CONFIG)
    assert not here.abstained and not there.abstained
    # Both centers are within their smoothing errors of f(x) and f(x').
    assert CONFIG.eps_in + here.smoothing_error + there.smoothing_error < here.eps_out


def test_thresholds_of_the_user_are_decided(isometric):
    encoder, image = isometric
    certificate = certify(encoder, image, jax.random.key(0), config=CONFIG)
    values = tuple(certificate.eps_out * factor for factor in (0.5, 0.8, 1.3, 2.0))
    config = dataclasses.replace(CONFIG, bound="union", eps_out_values=values)
    adaptive = certify(encoder, image, jax.random.key(0), config=config)
    assert adaptive.eps_out == values[2]
    assert adaptive.num_drawn < certificate.num_drawn
    too_small = tuple(certificate.eps_out * factor for factor in (0.3, 0.4, 0.5, 0.6))
    none = dataclasses.replace(config, eps_out_values=too_small)
    abstained = certify(encoder, image, jax.random.key(0), config=none)
    assert abstained.abstained and abstained.eps_out == math.inf
    assert "threshold" in abstained.reason


@pytest.mark.parametrize("bound", ["exact", "union"])
def test_bounds_at_another_alpha_follow_from_what_is_stored(isometric, bound):
    encoder, image = isometric
    config = dataclasses.replace(CONFIG, bound=bound)
    c = certify(encoder, image, jax.random.key(0), config=config)
    again = [
        eps_out_from_counts(
            c.distances, c.counts, c.n, config=dataclasses.replace(config, alpha2=alpha)
        )
        for alpha in (0.1, 0.01, 0.001)
    ]
    # A threshold that was accepted earlier may have fallen behind by the end: never the reverse.
    assert again[1] == c.eps_out if bound == "exact" else again[1] >= c.eps_out
    assert again == sorted(again) and np.isfinite(again).all()


def test_devices_and_interruptions_change_nothing(isometric):
    encoder, image = isometric
    images = [image, image[::-1], 1 - image, image**2]
    for bound in ("exact", "union"):
        config = dataclasses.replace(CONFIG, bound=bound)
        whole = run(encoder, images, config)
        one = run(encoder, images, config, mesh=data_mesh(jax.devices()[:1]))
        rest = run(encoder, images[2:], config, indices=[2, 3])
        for index, certificate in whole.items():
            np.testing.assert_equal(one[index]._asdict(), certificate._asdict())
            if index >= 2:
                np.testing.assert_equal(rest[index]._asdict(), certificate._asdict())


@pytest.mark.parametrize("divergence", ["l1", "l2", "linf"])
def test_medians_equal_a_plain_sort(divergence):
    points = np.random.default_rng(1).standard_normal((301, 5)).astype(np.float32)
    order = {"l1": 1, "l2": 2, "linf": np.inf}[divergence]
    distances = np.linalg.norm(points[:, None].astype(np.float64) - points, ord=order, axis=2)
    expected = np.sort(distances, axis=1)[:, 150]
    for num_devices in (1, 8) if divergence == "l2" else (8,):
        mesh = data_mesh(jax.devices()[:num_devices])
        medians = median_distances(jnp.asarray(points), divergence=divergence, mesh=mesh)
        np.testing.assert_allclose(medians, expected, rtol=1e-5)


@pytest.mark.parametrize("num, devices, shape", [(301, 1, (1, 384)), (2500, 2, (2, 640))])
def test_medians_in_the_blocks_of_a_gpu(num, devices, shape, monkeypatch):
    """Of as few rows as all devices need, and the same."""
    monkeypatch.setattr(enclosing, "_ROW_BLOCK", {})
    points = np.random.default_rng(1).standard_normal((num, 3)).astype(np.float32)
    mesh = data_mesh(jax.devices()[:devices])
    medians = jax.jit(lambda x: median_distances(x, divergence="l2", mesh=mesh))
    distances = np.linalg.norm(points[:, None].astype(np.float64) - points, axis=2)
    expected = np.sort(distances, axis=1)[:, (num + 1) // 2 - 1]
    np.testing.assert_allclose(medians(points), expected, rtol=1e-5)
    blocks, rows = shape
    assert f"f32[{blocks},{rows},3]" in str(jax.make_jaxpr(medians)(points))


def test_the_ball_that_is_too_small_makes_it_abstain(isometric):
    # With n0 at the least that is allowed, the check of the center often fails: never silently.
    encoder, image = isometric
    config = dataclasses.replace(CONFIG, delta=0.045)
    certificates = run(encoder, [image] * 30, config).values()
    abstained = [c for c in certificates if c.abstained]
    assert abstained
    for c in certificates:
        lower = stats.beta.ppf(0.025, c.num_in_ball, 600 - c.num_in_ball + 1)
        assert c.abstained == (lower < 0.455)
        assert (c.eps_out == math.inf) == c.abstained
    assert all("too few" in c.reason for c in abstained)


@pytest.mark.parametrize("scale", [0.0, 1e-25])
def test_representations_without_a_distance_make_it_abstain(isometric, scale):
    """Of one point, or so small that squares are 0: eps_out was 0, a perfect certificate."""
    encoder, image = isometric
    scaled = encoder.replace(params=encoder.params * scale)
    [certificate] = run(scaled, [image], CONFIG).values()
    assert certificate.abstained and certificate.eps_out == math.inf
    assert "one representation" in certificate.reason


def not_finite_where_bright(params, images):
    found = project(params, images)
    bright = images.mean((1, 2, 3)) > 0.8
    return found.at[:, 3].set(jnp.where(bright, jnp.nan, found[:, 3]))


@pytest.mark.parametrize("divergence", ["l2", "linf"])
@pytest.mark.parametrize("bound", ["exact", "union"])
def test_representations_that_are_not_finite_make_it_abstain(isometric, bound, divergence):
    encoder, image = isometric
    encoder = from_fn(not_finite_where_bright, encoder.params, input_size=(4, 4))
    config = dataclasses.replace(CONFIG, bound=bound, divergence=divergence)
    certificates = run(encoder, [image, np.ones_like(image)], config)
    assert certificates[0].num_bad == 0 and not certificates[0].abstained
    bad = certificates[1]
    assert bad.abstained and bad.eps_out == math.inf and bad.num_bad >= CONFIG.n0
    assert bad.reason == "representations not finite"
    if bound == "exact":  # every sample is counted, in whatever stage
        assert bad.num_bad == bad.num_drawn


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sigma": 0.0}, "sigma > 0"),
        ({"eps_in": -0.1}, "eps_in > 0"),
        ({"sigma": math.nan}, "sigma > 0, got nan"),
        ({"sigma": "0.25"}, "sigma > 0, got '0.25'"),
        ({"alpha1": 0.0}, "alpha1 > 0 and < 1"),
        ({"alpha2": 1.5}, "alpha2 > 0 and < 1"),
        ({"alpha2": math.nan}, "alpha2 > 0 and < 1"),
        ({"delta": 0.5}, "delta > 0 and < 0.5"),
        ({"delta": 1e-9}, "n0 >= "),
        ({"n": 1000.5}, "n >= 1, got 1000.5"),
        ({"n": True}, "n >= 1, got True"),
        ({"n": 10**30}, "less than 2.31 samples"),
        ({"n0": -600}, "n0 >= 1"),
        ({"step": 0}, "step >= 1"),
        ({"clip": "no"}, "clip to be True or False"),
        ({"bound": None}, "Unknown bound 'None'"),
        ({"n": 4, "alpha2": 0.5, "eps_in": 0.05, "bound": "hoeffding"}, "interpolated quantile"),
        ({"eps_out_values": [1.0]}, "eps_out_values as a tuple"),
        ({"eps_out_values": (1.0, math.nan)}, "eps_out_values > 0, got nan"),
        ({"n0": 500}, "n0 >= 784"),
        ({"n0": 1000, "bound": "hoeffding"}, "n0 >= 1199"),
        ({"n": 37}, "n >= 38"),
        ({"n": 150, "bound": "hoeffding"}, "n >= 157"),
        ({"eps_in": 9.0}, "a larger sigma"),
        ({"divergence": "cosine"}, "triangle inequality"),
        ({"bound": "exakt"}, "did you mean 'exact'"),
        ({"eps_out_values": (0.0,)}, "eps_out_values > 0"),
        ({"tolerance": 0.0}, "tolerance > 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        CenterConfig(**settings)
