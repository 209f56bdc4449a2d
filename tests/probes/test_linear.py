"""The training of a linear probe against a NumPy twin; ranks."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.probes import linear
from ur_jax.probes.linear import ProbeConfig


def twin(state, features, labels, order, mask, config):
    """All epochs in NumPy, float64: softmax regression by SGD with momentum."""
    params = {k: np.asarray(v, np.float64) for k, v in state.params.items()}
    velocity = {k: np.zeros_like(v) for k, v in params.items()}
    mean, var, losses = np.zeros(features.shape[1]), np.ones(features.shape[1]), []
    for epoch in range(config.num_epochs):
        rate = {0: 2.0, 1: 2.0, 2: 0.2, 3: 0.02}[epoch]
        for rows in (column[kept] for column, kept in zip(order[epoch].T, mask[epoch].T)):
            x = features[rows].astype(np.float64)
            if config.batch_norm:
                m, v = x.mean(0), x.var(0)
                x = (x - m) / np.sqrt(v + 1e-6)
                mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v * len(rows) / (len(rows) - 1)
            logits = x @ params["kernel"] + params["bias"]
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            picked = np.arange(len(rows)), labels[rows]
            losses += list(-np.log(p[picked]))
            p[picked] -= 1
            p /= len(rows)
            for name, grad in (("kernel", x.T @ p), ("bias", p.sum(0))):
                velocity[name] = 0.9 * velocity[name] + grad
                params[name] = params[name] - rate * velocity[name]
    return params, mean, var, np.sum(losses)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_epochs_agree_with_a_numpy_twin(batch_norm):
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((19, 5)) * [1, 2, 3, 1, 1] + 1).astype(np.float32)
    labels = rng.integers(0, 3, 19).astype(np.int32)
    config = ProbeConfig(
        num_epochs=4, learning_rate=2.0, milestones=(2, 3), batch_size=8, batch_norm=batch_norm
    )
    state = linear.init_state(jax.random.key(0), 5, 3, config=config)
    assert 0.005 < float(state.params["kernel"].std()) < 0.02
    assert not state.params["bias"].any()
    orders = [linear.epoch_order(19, 8, seed=0, epoch=epoch) for epoch in range(4)]
    for order, mask in orders:
        assert order.shape == (8, 3) and sorted(order[mask]) == list(range(19))
    params, mean, var, loss = twin(state, features, labels, *zip(*orders), config)
    total = 0.0
    for epoch, (order, mask) in enumerate(orders):
        rate = np.float32(config.learning_rate_at(epoch))
        state, sums = linear.train_epoch(state, features, labels, order, mask, rate, config=config)
        assert sums.images == 19
        total += float(sums.loss)
    assert total == pytest.approx(loss, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
                 state.params, params)  # fmt: skip

    # Folded, it is the same function of features that were not normalised.
    folded = linear.finish(state, config=config)
    x = features.astype(np.float64)
    if batch_norm:
        np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(state.var, var, rtol=1e-5)
        x = (x - mean) / np.sqrt(var + 1e-6)
    expected = x @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(
        features @ folded["kernel"] + folded["bias"], expected, rtol=2e-4, atol=1e-4
    )


def test_the_papers_schedule_and_bad_settings():
    rates = [ProbeConfig().learning_rate_at(epoch) for epoch in (0, 14, 15, 19, 20, 24)]
    np.testing.assert_allclose(rates, [30, 30, 3, 3, 0.3, 0.3])
    for change in (
        *({"num_epochs": n} for n in (0, 2.5)),
        *({"learning_rate": rate} for rate in (0.0, math.nan, math.inf)),
        *({"momentum": m} for m in (1.0, -0.1, math.nan)),
        {"decay": -1.0},
        *({"milestones": m} for m in ((3, 2), (2, 2), (-1, 2))),
    ):
        with pytest.raises(ValueError, match=f"Expected.* {next(iter(change))}.* got"):
            ProbeConfig(**change)
    with pytest.raises(ValueError, match="2 classes"):
        linear.init_state(jax.random.key(0), 3, 1, config=ProbeConfig())


def test_what_is_masked_counts_nowhere_and_what_is_not_finite_is_counted():
    config = ProbeConfig(batch_norm=True)
    state = linear.init_state(jax.random.key(0), 2, 3, config=config)
    features = jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [3.0, -1.0]])
    labels, rate = jnp.array([0, 1, 2]), jnp.float32(0.1)
    mask = jnp.array([True, False, True])
    stepped, totals = linear.train_step(state, features, labels, mask, rate, config=config)
    clean = features.at[1].set(7.0)
    expected, _ = linear.train_step(state, clean, labels, mask, rate, config=config)
    jax.tree.map(np.testing.assert_array_equal, stepped, expected)
    assert (totals.images, totals.bad) == (2, 0) and np.isfinite(totals.loss)
    _, totals = linear.train_step(state, features, labels, mask | True, rate, config=config)
    assert (totals.images, totals.bad) == (3, 1)


def test_logits_that_are_not_finite_are_of_no_class():
    logits = jnp.array([[1.0, 3.0, 2.0], [jnp.nan, 2.0, 0.0], [0.0, jnp.inf, 1.0]])
    predicted, rank = linear.classify(lambda_of(logits), jnp.zeros((3, 2, 2, 3)), jnp.zeros(3, int))
    np.testing.assert_array_equal(predicted, [1, -1, -1])
    assert rank[1] == 2


def lambda_of(logits):
    """A classifier that says the same of every batch; a pytree, as `classify` wants it."""
    return jax.tree_util.Partial(lambda logits, images: logits, logits)


def test_ranks_break_ties_as_argmax_and_nan_is_wrong():
    logits = jnp.array([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [1.0, jnp.nan, 0.0]])
    labels = jnp.array([2, 0, 2, 1])
    np.testing.assert_array_equal(linear.label_ranks(logits, labels), [1, 0, 2, 2])
