"""Certificates of one stream: closed forms, extremal cases, simulated certificates, an attack.

A simulation counts false certificates and would fail a correct one with the stated probability.
`UR_JAX_SIMULATIONS=10000` simulates as many of each, in minutes.
"""

from __future__ import annotations

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ur_jax.certify import (
    CosineConfig,
    GeometricMedianConfig,
    MeanConfig,
    NeighbourConfig,
    RandomizedConfig,
    certify,
    certify_stream,
    denoised,
    directions_of,
    part_of,
    smoothed,
)
from ur_jax.certify.joint import cosine, geometric_median, mean, neighbour
from ur_jax.certify.joint.stream import Measured
from ur_jax.devices import data_mesh
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError

NUM = int(os.environ.get("UR_JAX_SIMULATIONS", "60"))
COMMON = {"sigma": 0.25, "eps_in": (0.25, 0.1), "n0": 300, "n": 1500, "m": 1500, "step": 300}
CONFIGS = {
    "geometric_median": GeometricMedianConfig(**COMMON),
    "mean": MeanConfig(**COMMON, ball=4.0),
    "cosine": CosineConfig(**COMMON),
    "neighbour": NeighbourConfig(**COMMON),
}


def project(params, images):
    return images.reshape(images.shape[0], -1) @ params["weight"] + params["offset"]


def saturate(params, images):
    return jnp.tanh(3 * (images.reshape(images.shape[0], -1) @ params["weight"]))


@pytest.fixture(scope="session")
def params():
    weight = np.linalg.qr(np.random.default_rng(0).standard_normal((48, 8)))[0]
    return {"weight": jnp.asarray(weight, jnp.float32), "offset": 0.3 * jnp.ones(8)}


@pytest.fixture(scope="session")
def linear(params):
    """Orthonormal rows: f(x + noise) is Gaussian about f(x), and moves as far as x does."""
    return from_fn(project, params, input_size=(4, 4))


@pytest.fixture(scope="session")
def curved(params):
    return from_fn(saturate, params, input_size=(4, 4))


@pytest.fixture(scope="session")
def images():
    levels = np.random.default_rng(1).integers(64, 192, (4, 4, 4, 3))
    return (levels / 255).astype(np.float32)


def parts(encoder, images, configs=CONFIGS):
    models = {name: encoder for name in configs}
    if "neighbour" in models:
        models["neighbour"] = directions_of(encoder, np.asarray(encoder(jnp.asarray(images))))
    return {name: part_of(models[name], config) for name, config in configs.items()}


def run(encoder, images, configs=CONFIGS, seed=0, **rest):
    found = parts(encoder, images, configs)
    return dict(certify_stream(encoder, images, jax.random.key(seed), parts=found, **rest))


@pytest.fixture(scope="session")
def whole(linear, images):
    return run(linear, images)


def test_devices_batches_and_interruptions_change_nothing(linear, images, whole):
    found, sizes = parts(linear, images), {"mesh": data_mesh(jax.devices()[:1]), "batch_size": 50}
    one = dict(certify_stream(linear, images[:2], jax.random.key(0), parts=found, **sizes))
    later = certify_stream(linear, images[2:], jax.random.key(0), parts=found, indices=[2, 3])
    for index, certificates in [*one.items(), *later]:
        for name, certificate in certificates.items():
            np.testing.assert_equal(certificate._asdict(), whole[index][name]._asdict())


def test_alone_as_in_one_stream(linear, images, whole):
    directions = directions_of(linear, np.asarray(linear(jnp.asarray(images))))
    for name, config in CONFIGS.items():
        model = directions if name == "neighbour" else linear
        alone = certify(model, images[1], jax.random.key(0), config=config, index=1)
        np.testing.assert_equal(alone._asdict(), whole[1][name]._asdict())


def test_fewer_samples_than_a_step_are_drawn_alone(linear, images):
    drawn = []

    def watched(params, batch):
        drawn.append(len(batch))  # as it is traced: the images of a piece on one device
        return project(params, batch)

    few = dict(COMMON, n0=40, n=60, m=60)
    encoder = from_fn(watched, linear.params, input_size=(4, 4))
    of = lambda step: run(
        encoder, images[:1], {"geometric_median": GeometricMedianConfig(**few | {"step": step})},
        mesh=data_mesh(jax.devices()[:1]), batch_size=1000,
    )  # fmt: skip
    large, exact = (of(step)[0]["geometric_median"]._asdict() for step in (1000, 60))
    np.testing.assert_equal(large, exact)
    assert max(drawn) == 60


def test_a_linear_encoder_has_the_closed_forms(linear, images):
    """Where nothing is clipped, f(x + noise) ~ N(f(x), sigma^2 I_8)."""
    sigma = 0.25
    configs = {n: dataclasses.replace(c, noise="float", n0=1500) for n, c in CONFIGS.items()}
    for certificates in run(linear, images[:2], configs).values():
        median, means, direction, near = (certificates[name] for name in CONFIGS)
        for j, eps in enumerate(COMMON["eps_in"]):
            # What really moves: eps. R is a chi quantile, the top eigenvalue sigma^2.
            level = stats.norm.cdf(stats.norm.ppf(median.share[j]) + eps / sigma)
            radius = sigma * stats.chi.ppf(level, 8)
            expected = geometric_median.constant(float(median.share[j])) * radius
            assert 0.99 < median.eps_out_population[j] / expected < 1.15
            assert median.eps_out[j] > median.eps_out_population[j] > eps
            expected = math.sqrt(math.expm1((eps / sigma) ** 2)) * sigma
            assert 1.0 < means.eps_out_population[j] / expected < 2.2
            assert means.eps_out[j] > means.eps_out_population[j] > eps
        assert np.all(np.diff(direction.cosine) > 0)  # at a smaller radius
        assert np.all(direction.cosine <= direction.cosine_population)
        assert not near.abstained and 0 < near.radius < near.radius_population < 4 * sigma


def test_the_worst_case_of_the_geometric_median_attains_its_constant():
    """Mass q where the tangents from the median touch the ball, the rest far beyond it."""
    for in_ball, beyond in ((6, 2), (14, 6)):
        q = in_ball / (in_ball + beyond)
        distance = q / math.sqrt(2 * q - 1)
        along, across = 1 / distance, math.sqrt(1 - 1 / distance**2)
        points = [[along, across], [along, -across]] * (in_ball // 2) + [[1e4, 0.0]] * beyond
        found, left = geometric_median.geometric_median(jnp.asarray(points, jnp.float32))
        assert left <= geometric_median.GRADIENT
        bound = geometric_median.constant(q)
        assert bound == pytest.approx(distance)
        most = geometric_median.constant(q, float(left) + 1e-6)
        assert 0.99 * bound < np.linalg.norm(found) <= most


@pytest.mark.parametrize("ratio", [0.2, 1.0, 2.0])
def test_no_half_space_moves_further_than_the_mean_says_and_one_comes_near(ratio):
    """f = 1 beyond a threshold t: it moves by Phi(ratio - t) - Phi(-t), in units of sigma."""
    t = np.linspace(-6, 6, 241)
    p = stats.norm.sf(t)
    moved = stats.norm.sf(t - ratio) - p
    bound = mean.chi(ratio, 1.0) * np.sqrt(p * (1 - p))
    assert np.all(moved <= bound)
    assert (moved / bound).max() > 0.55


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_false_certificates_are_as_rare_as_they_say(name, adaptive):
    """False alarm 1e-4 each: simulated samples, of a truth that is known and hard."""
    alpha, rng = 0.05, np.random.default_rng(0)
    settings = COMMON | {"alpha2": alpha, "alpha1": alpha, "n": 1200, "step": 100}
    settings |= {"eps_in": (0.25,), "noise": "float", "adaptive": adaptive, "tolerance": 0.2}
    config = dataclasses.replace(CONFIGS[name], **settings)
    false = sum(SIMULATED[name](config, rng) for _ in range(NUM))
    assert false <= stats.binom.ppf(1 - 1e-4, NUM, alpha)


def certificates(part, config, anchor, rows, sums, clean):
    """As the stream: a certificate at every look, until it is settled."""
    for n in config.looks:
        found = Measured(clean, anchor, rows(n), sums(n), n, config.n0 + n, 0, 48)
        certificate = part.certificate(found)
        if part.is_settled(certificate, found):
            break
    return certificate


def simulated_median(config, rng):
    """Distances of two values only, the farther one exactly at its probability."""
    away = np.sort(rng.random(config.n0)).astype(np.float32)
    rows = rng.random(config.n).astype(np.float32)
    anchor = {"center": np.zeros(2, np.float32), "away": away}
    part = geometric_median.GeometricMedian(config)
    c = certificates(part, config, anchor, lambda n: rows[:n], lambda n: (), np.zeros(2))
    true = config.level(float(c.share[0]), 0.25)  # quantile of the uniform distribution
    return c.eps_out_population[0] < geometric_median.constant(float(c.share[0])) * true


def simulated_mean(config, rng, rare=0.004):
    """One dimension, far away with a small probability."""
    values = 4.0 * (rng.random(config.n) < rare)
    anchor = {"c": np.zeros(1, np.float32), "ball": (np.zeros(1, np.float32), np.float32(4.0))}
    sums = lambda n: {
        "products": np.array([[(values[:n] ** 2).sum()]]),
        "sum": np.array([values[:n].sum()]),
    }
    c = certificates(mean.Mean(config), config, anchor, lambda n: (), sums, np.zeros(1))
    return c.eps_out_population[0] < mean.chi(0.25, 0.25) * math.sqrt(16 * rare)


def simulated_cosine(config, rng, rare=0.01):
    """Nearly always along v, rarely against it: as f = sign beyond a threshold."""
    rows = np.where(rng.random(config.n) < rare, -1.0, 1.0).astype(np.float32)
    v = np.array([1.0, 0.0], np.float32)
    c = certificates(cosine.Cosine(config), config, v, lambda n: rows[:n], lambda n: (), v)
    moved = stats.norm.cdf(stats.norm.ppf(1 - rare) - 1.0)
    return c.cosine_population[0] > 2 * moved - 1


def simulated_neighbour(config, rng, rare=0.2):
    """Three directions, two of them often nearer."""
    values = np.where(rng.random((config.n, 3)) < rare, -1.0, 1.0)
    near = np.array([2, 1][: rng.integers(1, 3)])  # by betting; the other one by Bernstein
    anchor = {"top": np.int32(0), "between": np.zeros((3, 2), np.float32), "near": near}
    sums = lambda n: {"sum": values[:n].sum(0), "squares": (values[:n] ** 2).sum(0)}
    rows, part = lambda n: values[:n, near], neighbour.Neighbour(config)
    c = certificates(part, config, anchor, rows, sums, np.zeros(2))
    return c.radius_population > 0.25 * stats.norm.ppf(1 - rare)


SIMULATED = {
    "geometric_median": simulated_median,
    "mean": simulated_mean,
    "cosine": simulated_cosine,
    "neighbour": simulated_neighbour,
}


def test_another_alpha_follows_from_what_is_kept(linear, images, whole):
    for certificate in (whole[0][name] for name in ("geometric_median",)):
        config = CONFIGS["geometric_median"]
        again = geometric_median.eps_out_of(
            certificate.distances, certificate.counts, certificate.n, eps_in=0.25,
            share=float(certificate.share[0]), num_values=48, config=config,
        )  # fmt: skip
        assert 1.0 <= again[0] / certificate.eps_out[0] < 1.1
    c = whole[0]["mean"]
    kept = {name: getattr(c, name) for name in ("ball", "reach", "top", "spread", "n")}
    again = mean.eps_out_of(**kept, num_values=48, config=CONFIGS["mean"])
    np.testing.assert_array_equal(again[0], c.eps_out)
    stricter = dataclasses.replace(CONFIGS["mean"], alpha2=1e-6)
    assert np.all(mean.eps_out_of(**kept, num_values=48, config=stricter)[1] > again[1])
    c = whole[0]["cosine"]
    assert cosine.lower_of(c.lowest, c.width, c.bins, 48, CONFIGS["cosine"]) == c.lower
    stricter = dataclasses.replace(CONFIGS["cosine"], alpha2=1e-6)
    assert cosine.lower_of(c.lowest, c.width, c.bins, 48, stricter) < c.lower
    c = whole[0]["neighbour"]
    kept = (c.means, c.variances, c.predicted, c.n, 8, 48, CONFIGS["neighbour"])
    bins = {name: getattr(c, name) for name in ("near", "lowest", "width", "bins")}
    assert neighbour.lower_of(*kept, **bins) == c.lower


def test_adaptive_stops_early_and_says_no_more_than_all_samples(curved, images):
    settings = COMMON | {"n": 12_000}
    configs = {
        name: dataclasses.replace(config, **settings, adaptive=True, tolerance=0.3)
        for name, config in CONFIGS.items()
    }
    for name, config in configs.items():
        found = run(curved, images[:2], {name: config})[0][name]
        assert found.n < 12_000 and found.num_drawn == 300 + found.n


def test_what_a_user_computes_moves_less_than_certified_under_an_attack(curved, images, whole):
    """PGD on the smoothed encoder with common noise, in the l2 ball of eps_in."""
    eps, image = 0.25, jnp.asarray(images[0])
    found = run(curved, images)[0]
    draws = 0.25 * jax.random.normal(jax.random.key(3), (256, *image.shape))

    def smooth(delta):
        return curved(jnp.clip(image + delta + draws, 0, 1)).mean(axis=0)

    start = smooth(jnp.zeros_like(image))
    step = jax.jit(jax.grad(lambda delta: ((smooth(delta) - start) ** 2).sum()))
    delta = 0.01 * jax.random.normal(jax.random.key(4), image.shape)
    for _ in range(30):
        gradient = step(delta)
        delta = delta + 0.1 * gradient / jnp.linalg.norm(gradient)
        delta = delta * jnp.minimum(1, eps / jnp.linalg.norm(delta))
    moved = np.asarray(jnp.clip(image + delta, 0, 1))
    assert np.linalg.norm(moved - images[0]) <= eps * (1 + 1e-6)
    both = np.stack([images[0], np.round(moved * 255) / 255]).astype(np.float32)
    for name in ("geometric_median", "mean"):
        config = CONFIGS[name]
        ours = smoothed(curved, both, jax.random.key(5), method=name, m=1500, config=config)
        assert 0.1 < np.linalg.norm(ours[1] - ours[0]) < found[name].eps_out[0]
    config = CONFIGS["cosine"]
    ours = smoothed(curved, both, jax.random.key(5), method="cosine", m=1500, config=config)
    found = found["cosine"].cosine[0]
    assert ours[0] @ ours[1] / np.linalg.norm(ours[0]) / np.linalg.norm(ours[1]) > found


def not_finite_where_bright(params, images):
    found = project(params, images)
    return found.at[:, 3].set(jnp.where(images.mean((1, 2, 3)) > 0.8, jnp.nan, found[:, 3]))


def test_representations_that_are_not_finite_make_them_abstain(params, images):
    encoder = from_fn(not_finite_where_bright, params, input_size=(4, 4))
    white, models = np.ones((1, 4, 4, 3), np.float32), parts(encoder, images)
    [(_, found)] = certify_stream(encoder, white, jax.random.key(0), parts=models)
    for certificate in found.values():
        assert certificate.abstained and certificate.num_bad > 0
        assert certificate.reason == "representations not finite"
    assert np.all(np.isinf(found["mean"].eps_out)) and found["neighbour"].radius == 0


def halve(images):
    return 0.5 * images


def test_a_denoiser_is_part_of_what_is_certified(linear, images):
    encoder = denoised(linear, halve)
    np.testing.assert_allclose(encoder(images), linear(0.5 * images), rtol=1e-5)
    config = CONFIGS["geometric_median"]
    plain = certify(linear, images[0], jax.random.key(0), config=config)
    behind = certify(encoder, images[0], jax.random.key(0), config=config)
    np.testing.assert_allclose(behind.eps_out, 0.5 * plain.eps_out, rtol=0.05)
    with pytest.raises(UserError, match="denoiser that gives images"):
        denoised(linear, lambda images: images.mean(axis=3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MeanConfig(eps_in=()), "at least one radius"),
        (lambda: MeanConfig(eps_in=(0.0,)), "eps_in > 0"),
        (lambda: MeanConfig(ball=-1.0), "ball > 0"),
        (lambda: GeometricMedianConfig(n=20), "n >= "),
        (lambda: CosineConfig(noise="gird"), "did you mean 'grid'"),
        (lambda: NeighbourConfig(bank=0), "bank >= 1"),
        (lambda: RandomizedConfig(bound="calibrated"), "radii"),
        (lambda: CosineConfig(eps_in=(9.0,)), "larger sigma"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_images_off_the_grid_and_other_streams_are_refused(linear, images):
    with pytest.raises(UserError, match="256 grey values"):
        certify(linear, images[0] + np.float32(1e-3), jax.random.key(0), config=CONFIGS["mean"])
    other = dataclasses.replace(CONFIGS["mean"], n=2000)
    with pytest.raises(UserError, match="one stream"):
        run(linear, images, {"cosine": CONFIGS["cosine"], "mean": other})
    with pytest.raises(UserError, match="Directions"):
        part_of(linear, CONFIGS["neighbour"])
    with pytest.raises(UserError, match="smoothed encoder"):
        smoothed(linear, images, jax.random.key(0), method="median")
