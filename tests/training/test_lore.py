"""LORE and Sim-CLIP against float64 twins, and what LORE's constraint is for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax import training
from ur_jax.attacks import AttackConfig, u_pgd
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError

EPS, STEP_SIZE, NUM_STEPS, RATE = 0.1, 0.04, 4, 0.01


def network(params, images):
    x = images.reshape(len(images), -1)
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


@pytest.fixture(scope="module")
def problem():
    """256 images of four classes, their labels, and an encoder that tells them apart."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 256)
    centres = rng.choice([-1.0, 1.0], (4, 4, 4, 3))
    noise = 0.1 * rng.standard_normal((256, 4, 4, 3))
    images = np.clip(0.5 + 0.06 * centres[labels] + noise, 0, 1).astype(np.float32)
    w, v = rng.standard_normal((48, 32)) * 3 / 48**0.5, rng.standard_normal((32, 8)) / 32**0.5
    b = -images.reshape(256, -1).mean(0) @ w
    params = {name: x.astype(np.float32) for name, x in (("w", w), ("b", b), ("v", v))}
    return jnp.asarray(images), labels, from_fn(network, params, input_size=(4, 4))


class Twin:
    """The network in NumPy float64, with gradients written out."""

    def __init__(self, params):
        self.w, self.b, self.v = (np.asarray(params[n], np.float64) for n in "wbv")

    def __call__(self, x):
        return np.tanh(x.reshape(len(x), -1) @ self.w + self.b) @ self.v

    def gradients(self, x, of_output):
        """Of sum(of_output * f(x)): by the images, and by w, b, v."""
        flat = x.reshape(len(x), -1)
        hidden = np.tanh(flat @ self.w + self.b)
        inside = of_output @ self.v.T * (1 - hidden**2)
        by_weights = {"w": flat.T @ inside, "b": inside.sum(0), "v": hidden.T @ of_output}
        return (inside @ self.w.T).reshape(x.shape), by_weights


def attacked_by_twin(gradient, images, key):
    """PGD in float64 from the documented random start: image i uses the key's fold i."""
    draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i), (4, 4, 3), minval=-1.0)
    start = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(len(images))), np.float64)
    low, high = np.maximum(images - EPS, 0), np.minimum(images + EPS, 1)
    x = np.clip(images + EPS * start, low, high)
    for _ in range(NUM_STEPS):
        x = np.clip(x + STEP_SIZE * np.sign(gradient(x)), low, high)
    return x


def softplus(z):
    return np.logaddexp(0.0, z)


ATTACK = training.Adversary("loss", AttackConfig(EPS, STEP_SIZE, NUM_STEPS))
SGD = training.sgd(lambda step: RATE, momentum=0.0, weight_decay=0.0)


def test_a_dual_and_a_primal_step_equal_a_float64_twin(problem):
    images, _, encoder = problem
    images, rho, rate = images[:16], 0.02, 0.1
    settings = training.LoreConfig(rho=rho, primal_steps=3, dual_rate=rate, dual_width=5)
    method = training.Lore.of(encoder, settings=settings)
    state = training.init_state(method, encoder.params, SGD, jax.random.key(0))
    rng = np.random.default_rng(0)
    drawn = {k: 0.3 * rng.standard_normal(v.shape) for k, v in state.target["dual"].items()}
    state = state.replace(
        step=jnp.int32(2),
        params=jax.tree.map(lambda x: 1.1 * x + 0.02, state.params),
        target={**state.target, "dual": jax.tree.map(jnp.float32, drawn)},
    )
    step = jax.jit(functools.partial(training.train_step, method, SGD, ATTACK))
    views = training.Views(images, images)
    original = Twin(encoder.params)(np.asarray(images, np.float64))
    length = (original**2).sum(1)
    scaled = original / np.sqrt((original**2).mean(1, keepdims=True))
    dual = {k: np.asarray(v, np.float64) for k, v in state.target["dual"].items()}
    # Step 2 leaves the dual network alone, step 3 moves it first: three primal steps lie between.
    for number in (2, 3):
        key = jax.random.key(number)
        before, (state, metrics, samples) = state, step(state, views, key)
        now, x = Twin(before.params), np.asarray(images, np.float64)
        drift = now(x) - original
        hidden = np.maximum(scaled @ dual["kernel1"] + dual["bias1"], 0)
        logit = hidden @ dual["kernel2"] / 5**0.5 + dual["bias2"]
        if number == 3:
            slope = ((drift**2).sum(1) / length / rho - 1) / (1 + np.exp(-logit)) / len(x)
            inside = np.outer(slope, dual["kernel2"]) * (hidden > 0) / 5**0.5
            uphill = {"kernel1": scaled.T @ inside, "bias1": inside.sum(0)}
            uphill |= {"kernel2": hidden.T @ slope / 5**0.5, "bias2": slope.sum()}
            dual = {k: dual[k] + rate * uphill[k] for k in dual}
            hidden = np.maximum(scaled @ dual["kernel1"] + dual["bias1"], 0)
            logit = hidden @ dual["kernel2"] / 5**0.5 + dual["bias2"]
        for name, expected in dual.items():
            np.testing.assert_allclose(state.target["dual"][name], expected, rtol=1e-5, atol=1e-6)
        multiplier = softplus(logit)
        towards = lambda x, now=now: now.gradients(x, 2 * (now(x) - original))[0]
        moved = attacked_by_twin(towards, x, jax.random.split(key)[1])
        np.testing.assert_allclose(samples.attacked, moved[:8], atol=2e-6)
        violation = (drift**2).sum(1) - rho * length
        distance = ((now(moved) - original) ** 2).sum(1)
        np.testing.assert_allclose(
            metrics["loss"], (distance + multiplier * violation).mean(), rtol=1e-5
        )
        np.testing.assert_allclose(metrics["multiplier"], multiplier.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["violations"], (violation > 0).mean())
        _, attacked = now.gradients(moved, 2 * (now(moved) - original) / len(x))
        _, clean = now.gradients(x, 2 * multiplier[:, None] * drift / len(x))
        for name in "wbv":
            expected = np.asarray(before.params[name]) - RATE * (attacked[name] + clean[name])
            np.testing.assert_allclose(state.params[name], expected, rtol=1e-4, atol=1e-5)


def test_a_simclip_step_equals_a_float64_twin(problem):
    images, _, encoder = problem
    images = images[:16]
    method = training.SimClip.of(encoder)
    state = training.init_state(method, encoder.params, SGD, jax.random.key(0))
    state = state.replace(params=jax.tree.map(lambda x: 1.1 * x + 0.02, state.params))
    key = jax.random.key(7)
    step = jax.jit(functools.partial(training.train_step, method, SGD, ATTACK))
    after, metrics, samples = step(state, training.Views(images, images), key)

    now, x = Twin(state.params), np.asarray(images, np.float64)
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)

    def slope(z, to):
        """Of 1 - cos(z, to) by z."""
        u, t = unit(z), unit(to)
        cosine = (u * t).sum(1, keepdims=True)
        return -(t - cosine * u) / np.linalg.norm(z, axis=1, keepdims=True)

    uphill = lambda z: now.gradients(z, slope(now(z), now(x)))[0]
    moved = attacked_by_twin(uphill, x, jax.random.split(key)[1])
    np.testing.assert_allclose(samples.attacked, moved[:8], atol=2e-6)
    a, c = now(moved), now(x)
    np.testing.assert_allclose(metrics["loss"], 1 - (unit(a) * unit(c)).sum(1).mean(), rtol=1e-5)
    _, attacked = now.gradients(moved, slope(a, c) / len(x) / 2)
    _, clean = now.gradients(x, slope(c, a) / len(x) / 2)
    for name in "wbv":
        expected = np.asarray(state.params[name]) - RATE * (attacked[name] + clean[name])
        np.testing.assert_allclose(after.params[name], expected, rtol=1e-4, atol=1e-5)


def test_the_constraint_holds_where_fare_violates_it_and_keeps_probes_better(problem):
    """Equal steps: the bound. Equal robustness: a probe that was trained on the original."""
    images, labels, encoder = problem
    represent = jax.jit(lambda encoder, images: encoder(images))
    ones = np.ones((len(images), 1))
    original = np.asarray(represent(encoder, images))
    probe = np.linalg.lstsq(np.hstack([original, ones]), np.eye(4)[labels], rcond=None)[0]
    strong = AttackConfig(eps=EPS, step_size=EPS / 5, num_steps=15)
    views = training.Views(images, images)

    def measured(method, state):
        tuned = encoder.replace(params=method.encoder_variables(state))
        clean = np.asarray(represent(tuned, images))
        moved = u_pgd(tuned, images, jax.random.key(9), config=strong).representations
        drift = ((clean - original) ** 2).sum(1) / (original**2).sum(1)
        accuracy = (np.argmax(np.hstack([clean, ones]) @ probe, 1) == labels).mean()
        return np.median(np.linalg.norm(moved - clean, axis=1)), drift, accuracy

    ends = {}
    for method in (training.Fare.of(encoder), training.Lore.of(encoder)):
        optimizer = training.adamw(lambda step: 3e-3, weight_decay=0.0)
        step = jax.jit(functools.partial(training.train_step, method, optimizer, ATTACK))
        state = training.init_state(method, encoder.params, optimizer, jax.random.key(0))
        trace = []
        for i in range(200):
            state, _, _ = step(state, views, jax.random.fold_in(jax.random.key(1), i))
            if type(method) is training.Fare and i in range(16, 40, 2):
                trace.append(measured(method, state))
        ends[type(method).__name__] = measured(method, state), trace
    (distance, drift, accuracy), _ = ends["Lore"]
    (_, of_fare, _), trace = ends["Fare"]
    assert drift.mean() <= 1.1 * 0.1 and np.quantile(drift, 0.95) <= 2 * 0.1
    assert of_fare.min() > 0.1
    start = training.init_state(training.Fare.of(encoder), encoder.params, SGD, jax.random.key(0))
    before = measured(training.Fare.of(encoder), start)
    assert distance < 0.6 * before[0]
    # The first encoder on FARE's way that is as robust as LORE's.
    as_robust = next(each for each in trace if each[0] <= distance)
    assert trace[0][0] > distance
    assert accuracy >= as_robust[2] + 0.03


def test_any_step_rule_attacks_inside_training_and_bad_input_is_named(problem):
    images, _, encoder = problem
    method = training.Lore.of(encoder)
    adversary = training.Adversary("loss", AttackConfig(EPS, num_steps=4, rule="apgd"))
    step = jax.jit(functools.partial(training.train_step, method, SGD, adversary))
    state = training.init_state(method, encoder.params, SGD, jax.random.key(0))
    state, metrics, samples = step(state, training.Views(images, images), jax.random.key(1))
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0
    assert float(jnp.abs(samples.attacked - samples.clean).max()) <= EPS + 1e-6
    with pytest.raises(UserError, match="objective 'l2' inside training, got 'cosine'"):
        training.Adversary("loss", AttackConfig(objective="cosine"))
    with pytest.raises(UserError, match="rho > 0, got -1"):
        training.LoreConfig(rho=-1.0)
    with pytest.raises(UserError, match="float16: its largest number is 65504"):
        training.Lore.of(encoder, "float16")
    assert training.Lore.of(encoder, "bfloat16").dtype == "bfloat16"


def test_a_step_that_is_not_finite_leaves_nothing_but_its_number(problem):
    images, _, encoder = problem
    method = training.Lore.of(encoder)
    rate = lambda count: jnp.where(count == 1, jnp.nan, 0.01)
    optimizer = training.adamw(rate)
    step = jax.jit(functools.partial(training.train_step, method, optimizer, ATTACK))
    state = training.init_state(method, encoder.params, optimizer, jax.random.key(0))
    views = training.Views(images, images)
    first, metrics, _ = step(state, views, jax.random.key(1))
    assert metrics["skipped"] == 0
    second, metrics, _ = step(first, views, jax.random.key(2))
    assert metrics["skipped"] == 1 and int(second.step) == 2
    for a, b in zip(jax.tree.leaves(first.replace(step=second.step)), jax.tree.leaves(second)):
        np.testing.assert_array_equal(a, b)
