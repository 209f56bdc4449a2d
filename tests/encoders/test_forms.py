"""What layers compute on GPUs in another form, against the form of CPUs, on a CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.encoders.networks import forms
from ur_jax.encoders.networks.rewritten import with_fast_gradients


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("length", "keys"), [(5, 5), (8, 8), (3, 9)])
def test_padded_attention_is_attention_and_its_gradient_jaxs(length, keys):
    query, grad = (normal(seed, 2, length, 3, 4) for seed in (0, 3))
    key, value = (normal(seed, 2, keys, 3, 4) for seed in (1, 2))
    expected, back = jax.vjp(jax.nn.dot_product_attention, query, key, value)
    result, weights = forms._padded_attention(query, key, value)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6)
    assert weights.shape[2:] == (8, 8 if keys < 9 else 16)
    assert not weights[..., keys:].any()
    found = forms._padded_attention_gradient(query, key, value, result, weights, grad)
    for ours, jaxs in zip(found, back(grad), strict=True):
        np.testing.assert_allclose(ours, jaxs, rtol=0, atol=5e-6)
    # What the network calls is JAX's own here, bit for bit, under any transformation.
    ours, our_back = jax.vjp(forms.attention, query, key, value)
    np.testing.assert_array_equal(ours, expected)
    jax.tree.map(np.testing.assert_array_equal, our_back(grad), back(grad))


def test_gelu_by_erf_is_gelu():
    x = jnp.linspace(-6, 6, 1001)
    for form in (forms._gelu_by_erf, forms.gelu):
        np.testing.assert_allclose(form(x), jax.nn.gelu(x, approximate=False), rtol=0, atol=1e-6)
    slope = jax.vmap(jax.grad(forms._gelu_by_erf))(x)
    expected = jax.vmap(jax.grad(functools.partial(jax.nn.gelu, approximate=False)))(x)
    np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(jax.vmap(jax.grad(forms.gelu))(x), expected)


def test_relu_and_its_gradient_are_jaxs():
    x = jnp.array([-np.inf, -1.0, -0.0, 0.0, 1e-38, 2.0, np.inf, np.nan])
    np.testing.assert_array_equal(forms.relu(x), jax.nn.relu(x))
    grads = [jax.vjp(form, x)[1](jnp.ones_like(x))[0] for form in (forms.relu, jax.nn.relu)]
    np.testing.assert_array_equal(*grads)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_1x1_is_a_product_in_both_forms(stride):
    x, kernel = normal(0, 2, 7, 6, 3), normal(1, 1, 1, 3, 5)
    padding = ((0, 0), (0, 0))
    as_conv, by_conv = jax.vjp(functools.partial(forms._convolution, stride, padding), x, kernel)
    as_product, by_product = jax.vjp(functools.partial(forms._product, stride, padding), x, kernel)
    ours, by_ours = jax.vjp(
        lambda x, k: forms.convolution_2d(x, k, stride, padding, x.shape), x, kernel
    )
    np.testing.assert_allclose(as_conv, as_product, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours, as_product)
    grad = normal(2, *as_conv.shape)
    for a, b, c in zip(by_conv(grad), by_product(grad), by_ours(grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(c, b)


@pytest.mark.parametrize("groups", [1, 6])
def test_a_users_convolutions_are_rewritten_and_stay_the_same_function(groups):
    kernel, first = normal(0, 3, 3, 6 // groups, 6), normal(1, 6, 3, 1, 1)

    @jax.jit
    def inner(x):
        y = jax.lax.conv_general_dilated(x, first, (1, 1), "VALID")  # NCHW
        y = jax.nn.relu(y.transpose(0, 2, 3, 1))
        return jax.lax.conv_general_dilated(
            y, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    def network(x, shift):
        return {"mean": inner(x + shift).mean((1, 2))}, shift

    x = normal(2, 2, 3, 9, 8)
    total = lambda fn: lambda x: jnp.sum(fn(x, 0.5)[0]["mean"] ** 2)
    rewritten = with_fast_gradients(network)
    expected, found = network(x, 0.5), rewritten(x, 0.5)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    np.testing.assert_allclose(found[0]["mean"], expected[0]["mean"], rtol=0, atol=1e-5)
    gradients = [jax.grad(total(fn))(x) for fn in (network, rewritten)]
    np.testing.assert_allclose(*gradients, rtol=0, atol=1e-5 * float(jnp.abs(gradients[0]).max()))
    text = str(jax.make_jaxpr(rewritten)(x, 0.5))
    assert "custom_vjp" in text
    without = lambda x: jnp.sin(x)
    assert str(jax.make_jaxpr(with_fast_gradients(without))(x)) == str(jax.make_jaxpr(without)(x))


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (5, 6)])
def test_the_max_pools_gradient_on_gpus_is_that_of_cpus(size):
    random = np.random.default_rng(0)
    x = jax.nn.relu(jnp.round(2 * random.standard_normal((2, *size, 3))))  # with ties
    grad = jnp.round(8 * random.standard_normal((2, *(-(-n // 2) for n in size), 3)))
    expected = jax.jit(forms._max_pool_gradient)(x, grad)
    np.testing.assert_array_equal(jax.jit(forms._max_pool_gradient_gpu)(x, grad), expected)
