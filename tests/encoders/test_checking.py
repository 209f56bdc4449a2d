"""Encoders that would give meaningless numbers are refused or remarked upon; NaN is not lost."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ur_jax
from ur_jax.encoders import checking, from_fn, loading
from ur_jax.encoders.networks import forms
from ur_jax.errors import UserError

SIZE = (8, 6)
IMAGES = np.random.default_rng(0).random((5, *SIZE, 3), np.float32)
WEIGHTS = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)


def _make(fn, **settings):
    return from_fn(fn, WEIGHTS, **{"input_size": SIZE, **settings})


def _pooled(params, x):
    return jax.nn.relu(x.mean((1, 2)) @ params)


def _batch_norm(params, x):
    y = x.mean((1, 2)) @ params
    return (y - y.mean(0)) / (y.std(0) + 1e-3)


def _dropout(params, x):
    y = x.mean((1, 2)) @ params
    return y * jax.random.bernoulli(jax.random.key(0), 0.5, y.shape).astype(y.dtype)


def test_a_sound_encoder_passes_and_its_numbers_stay():
    encoder = _make(_pooled, check=True)
    assert encoder.check(IMAGES) == () == encoder.check(IMAGES[:1])
    assert _make(_pooled, dtype="bfloat16").check(IMAGES) == ()
    ours, kept = (jax.jit(f)(IMAGES) for f in (encoder, checking.keeping_nan(encoder)))
    np.testing.assert_array_equal(ours, kept)


@pytest.mark.parametrize(
    "fn, message",
    [
        (_batch_norm, "depends on the other images of its batch"),
        (_dropout, "other representations at other places of a batch"),
        (lambda p, x: x.mean((1, 2)) * 0 + p[0, :3], "collapsed: the same for all images"),
        (lambda p, x: x.mean((1, 2)) * 0, "collapsed"),
        (lambda p, x: jnp.log(x.mean((1, 2)) - 2.0), "not finite"),
        (lambda p, x: x.mean((1, 2)) * 1e38 * 1e38, "not finite"),
    ],
)
def test_what_would_mean_nothing_is_refused(fn, message):
    with pytest.raises(UserError, match=message):
        _make(fn).check(IMAGES)
    with pytest.raises(UserError, match=message):
        _make(fn, check=True)


def test_chance_is_found():
    draws = iter(range(1000))

    def noisy(params, x):
        noise = jax.pure_callback(
            lambda: np.float32(next(draws)), jax.ShapeDtypeStruct((), jnp.float32)
        )
        return x.mean((1, 2)) @ params + noise

    with pytest.raises(UserError, match="Two calls of encoder 'custom' differ"):
        _make(noisy).check(IMAGES)


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda p, x: jnp.round(255 * x).mean((1, 2)) @ p, "zero for 4 of 4 images"),
        (lambda p, x: jax.lax.stop_gradient(x.mean((1, 2)) @ p), "zero for 4 of 4 images"),
        (
            lambda p, x: x.mean((1, 2)) @ p + jnp.sqrt(x * 0).mean((1, 2, 3))[:, None],
            "not finite for 4 of 4 images",
        ),
        (
            # A network trained on 0..255: its own normalisation makes all of 0..1 the same.
            lambda p, x: jnp.tanh(((x - 120.0) / 60.0).mean((1, 2))) @ p,
            "if the network expects 0 to 255",
        ),
    ],
)
def test_what_stops_nothing_is_said(fn, message):
    (remark,) = _make(fn).check(IMAGES)
    assert message in remark
    with pytest.warns(UserWarning, match=message.replace("(", r"\(")):
        _make(fn, check=True)


def _nan_at(place):
    images = IMAGES.copy().reshape(len(IMAGES), -1)
    images[1, place] = np.nan
    return images.reshape(IMAGES.shape)


def _step(carry, x):
    return (jnp.maximum(carry, x),) * 2


_LOSING = {
    "relu": lambda x: jax.nn.relu(x),
    "clip": lambda x: jnp.clip(x, 0, 6),
    "min": lambda x: jnp.minimum(x, 0.5),
    "max pool": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    "our max pool": forms.max_pool_3x3,
    "max": lambda x: x.max((1, 2), keepdims=True),
    "min of all": lambda x: x.min((1, 2), keepdims=True),
    "cummax": lambda x: jax.lax.cummax(x, axis=1),
    "scan": lambda x: jax.lax.scan(_step, x[:, 0], x.swapaxes(0, 1))[1].swapaxes(0, 1),
    "loop": lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.maximum(y, 0.1), x),
    "branch": lambda x: jax.lax.cond(x.shape[0] > 1, jax.nn.relu, lambda y: y, x),
    "remat": jax.checkpoint(jax.nn.relu),
}


@pytest.mark.parametrize("name", _LOSING)
def test_no_maximum_loses_nan(name):
    """By NumPy's rule, which is JAX's: NaN in, NaN out, and only for the image that has it."""
    lossy = _LOSING[name]
    fn = lambda x: lossy(x).sum((1, 2, 3))
    for place in (0, 17, 143):
        found = np.isnan(jax.jit(checking.keeping_nan(fn))(_nan_at(place)))
        assert found.tolist() == [False, True, False, False, False], place
    np.testing.assert_array_equal(
        jax.jit(checking.keeping_nan(fn))(IMAGES), jax.jit(fn)(jnp.asarray(IMAGES))
    )


def test_nan_inside_the_demo_encoder_is_found():
    encoder = loading.load_encoder("demo")
    images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    images[2, 5, 5, 0] = np.nan
    found = checking.finite_inside(encoder, jnp.asarray(images))
    assert found.tolist() == [True, True, False, True]


def test_nan_that_arises_inside_and_is_hidden():
    def hidden(params, x):
        y = x.mean((1, 2))
        lost = jnp.where(jnp.isnan(y), 0.0, jnp.log(y - 2.0))  # NaN of a number that is none
        return jnp.maximum(jnp.where(jnp.isnan(lost), -1.0, lost), y) @ params

    assert _make(hidden).check(IMAGES) == ()  # guarded by its author: that is no maximum's doing
    with pytest.raises(UserError, match="not finite|NaN arises inside"):
        _make(lambda p, x: jnp.maximum(jnp.log(x.mean((1, 2)) - 2.0), 0.0) + x.mean((1, 2))).check(
            IMAGES
        )


def test_shapes_and_ranges_are_checked_first():
    with pytest.raises(UserError, match=r"\(B,8,6,3\)"):
        _make(_pooled).check(IMAGES[:, :4])
    with pytest.raises(UserError, match="divide by 255"):
        _make(_pooled).check(255 * IMAGES)


def test_every_public_object_fits_on_ten_lines():
    encoder = loading.load_encoder("demo")
    loaded = loading.load_variables("demo")
    for value in (encoder, loaded, *ur_jax.encoders.zoo.ENCODERS.values()):
        assert len(repr(value)) < 1000 and repr(value).count("\n") < 10
    assert repr(encoder) == (
        "Encoder('demo', 'paper': (32, 32, 3) -> (64,), float32, 283,520 parameters)"
    )
