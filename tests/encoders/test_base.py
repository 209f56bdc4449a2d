"""The encoder pytree, and what folding and training mean for its layers."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.encoders import check_images, from_fn
from ur_jax.encoders.networks.heads import MocoV2Head
from ur_jax.encoders.networks.layers import BatchNorm, Conv, NormConfig, fold_batch_norm
from ur_jax.encoders.networks.network import Network, NetworkFn
from ur_jax.encoders.networks.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    cifar_resnet18,
    cifar_resnet20,
    resnet18,
    resnet50,
)
from ur_jax.errors import UserError

SIZE = (8, 6)


def _project(params, images):
    return images.reshape(len(images), -1) @ params


def _images(count=3):
    return jnp.asarray(np.random.default_rng(0).random((count, *SIZE, 3), np.float32))


def _random_statistics(variables, seed=0):
    """Variables whose BatchNorms do something."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype), variables)


def test_normalisation_is_part_of_the_encoder():
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((144, 4)), jnp.float32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    encoder = from_fn(_project, weight, input_size=SIZE, mean=mean, std=std)
    expected = ((np.float64(_images()) - mean) / std).reshape(3, -1) @ np.float64(weight)
    np.testing.assert_allclose(encoder(_images()), expected, rtol=1e-4, atol=1e-4)
    assert encoder.dimension == 4


def test_encoder_passes_through_transformations_and_new_weights_do_not_recompile():
    traces = []

    @jax.jit
    def run(encoder, images):
        traces.append(1)
        return encoder(images)

    for seed in range(3):
        weight = jax.random.normal(jax.random.key(seed), (144, 4))
        run(from_fn(_project, weight, input_size=SIZE), _images())
    assert len(traces) == 1
    encoder = from_fn(_project, weight, input_size=SIZE)
    stacked = jax.vmap(encoder)(_images()[None])
    np.testing.assert_allclose(stacked[0], encoder(_images()), rtol=1e-6)
    gradient = jax.grad(lambda images: encoder(images).sum())(_images())
    np.testing.assert_allclose(gradient[0].ravel(), weight.sum(1), rtol=1e-4, atol=1e-5)


def test_a_users_flax_module_is_an_encoder_in_three_lines():
    module = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.mean((1, 2))])
    variables = module.init(jax.random.key(0), _images())
    encoder = from_fn(module.apply, variables, input_size=SIZE)
    np.testing.assert_allclose(encoder(_images()), module.apply(variables, _images()), rtol=1e-6)


def test_bfloat16_returns_float32_near_the_float32_result():
    weight = jax.random.normal(jax.random.key(0), (144, 4))
    exact = from_fn(_project, weight, input_size=SIZE)(_images())
    rounded = from_fn(_project, weight, input_size=SIZE, dtype="bfloat16")(_images())
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-6 < error < 2e-2  # 8 bits of mantissa


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_folded_equals_unfolded(block, stem):
    build = lambda folded: Network(
        ResNet((1, 2), block, width=4, stem=stem, folded=folded), MocoV2Head(6, 5)
    )
    images = jnp.asarray(np.random.default_rng(0).random((2, 16, 16, 3), np.float32))
    variables = _random_statistics(build(False).init(jax.random.key(0), images))
    folded = fold_batch_norm(variables)
    assert set(folded) == {"params"}
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(folded) == shapes(build(True).init(jax.random.key(0), images))
    expected = build(False).apply(variables, images)
    for name, value in build(True).apply(folded, images).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4)


@pytest.mark.parametrize("group_size", [None, 2])
def test_batch_norm_in_training_equals_numpy(group_size):
    x = np.random.default_rng(0).standard_normal((6, 3, 4, 5)) * 2 + 1
    norm = BatchNorm(NormConfig(group_size=group_size))
    variables = _random_statistics(norm.init(jax.random.key(0), jnp.float32(x)))
    y, updated = norm.apply(variables, jnp.float32(x), train=True, mutable="batch_stats")
    params, old = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), variables[part])
        for part in ("params", "batch_stats")
    )
    means, variances = [], []
    for group, ours in zip(
        np.split(x, 6 // (group_size or 6)), np.split(y, 6 // (group_size or 6))
    ):
        mean, var = group.mean((0, 1, 2)), group.var((0, 1, 2))
        expected = (group - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        means.append(mean)
        variances.append(group.var((0, 1, 2), ddof=1))
    for name, values in (("mean", means), ("var", variances)):
        expected = 0.9 * old[name] + 0.1 * np.mean(values, 0)
        np.testing.assert_allclose(updated["batch_stats"][name], expected, rtol=1e-5)


def test_1x1_convolution_equals_the_convolution():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 5, 3)), jnp.float32)
    conv = Conv(4, 1, 2)
    variables = conv.init(jax.random.key(0), x)
    expected = jax.lax.conv_general_dilated(
        x,
        variables["params"]["kernel"],
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(conv.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "build, size, features, num_params",
    [
        (resnet18, 224, 512, 11_176_512),
        (resnet50, 224, 2048, 23_508_032),
        (cifar_resnet18, 32, 512, 11_168_832),
        (cifar_resnet20, 32, 64, 432 + 13_824 + 50_688 + 202_752 + 1_376 + 2_752),
    ],
)
def test_published_sizes(build, size, features, num_params):
    # torchvision's counts without fc; the CIFAR stem has 3x3x3 kernels instead of 7x7x3. ResNet-20
    # by hand: stem, three stages of 3x3 kernels, BatchNorms, two 1x1 shortcuts with theirs.
    network, images = build(), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    output = jax.eval_shape(network.apply, variables, images)
    assert output.shape == (1, features)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == num_params


def test_bad_input():
    weight = jnp.zeros((144, 4))
    encoder = from_fn(_project, weight, input_size=SIZE)
    with pytest.raises(ValueError, match=r"\(B,8,6,3\).*\(3, 8, 5, 3\)"):
        encoder(_images()[:, :, :5])
    with pytest.raises(ValueError, match=r"\(B,8,6,3\)"):
        encoder(_images()[..., :1])
    with pytest.raises(ValueError, match="floating-point.*uint8.*255"):
        encoder(jnp.zeros((1, *SIZE, 3), jnp.uint8))
    with pytest.raises(ValueError, match="divide by 255"):
        check_images(encoder, 255 * _images())
    with pytest.raises(ValueError, match="clip"):
        check_images(encoder, _images() - 0.5)
    for place in range(0, 144, 13):  # wherever it falls in a vector register
        pixels = _images(1).reshape(-1).at[place].set(jnp.nan)
        with pytest.raises(ValueError, match="NaN"):
            check_images(encoder, pixels.reshape(1, *SIZE, 3))
    with pytest.raises(ValueError, match="NaN or infinite in weight"):
        from_fn(
            lambda p, x: _project(p["weight"], x),
            {"weight": weight.at[0].set(jnp.inf)},
            input_size=SIZE,
        )
    with pytest.raises(ValueError, match="'float16'.*float32"):
        from_fn(_project, weight, input_size=SIZE, dtype="float16")
    with pytest.raises(ValueError, match="'resise'.*'resize'"):
        from_fn(_project, weight, input_size=SIZE, preparation="resise")
    with pytest.raises(ValueError, match="std > 0"):
        from_fn(_project, weight, input_size=SIZE, std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match=r"\(B,D\)"):
        from_fn(lambda params, images: images, weight, input_size=SIZE)
    network = Network(ResNet((1,), BasicBlock, width=4, stem="cifar"))
    variables = network.init(jax.random.key(0), _images())
    with pytest.raises(ValueError, match="representation 'projection'.*backbone"):
        from_fn(NetworkFn(network, "projection"), variables, input_size=SIZE)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"std": (np.nan, 1.0, 1.0)}, "finite std in every channel"),
        ({"std": (1.0, np.inf, 1.0)}, "finite std in every channel"),
        ({"mean": (0.5, np.nan, 0.5)}, "finite mean in every channel"),
        ({"std": (-1.0, 1.0, 1.0)}, "std > 0"),
        ({"std": (1.0, 1.0)}, "std of 3 channels"),
        ({"std": 0.5}, "std of 3 channels"),
        ({"mean": ("a", "b", "c")}, "mean of 3 channels"),
        ({"input_size": 224}, r"\(height, width\) in pixels.*got 224"),
        ({"input_size": (0, 8)}, r"\(height, width\)"),
        ({"input_size": (8.5, 8)}, r"\(height, width\)"),
        ({"input_size": (8, 8, 3)}, r"\(height, width\)"),
        ({"params": {"w": "text"}}, "got str 'text' at 'w'"),
        ({"params": {"a": [np.array([object()])]}}, "got ndarray .* at 'a/0'"),
        ({"params": {"w": np.array([1.0, np.nan])}}, "NaN or infinite in w"),
        ({"apply_fn": None}, "Expected a function .* got NoneType"),
        ({"apply_fn": lambda p, x: x.argmax(1).reshape(len(x), -1)}, "one floating-point array"),
        ({"apply_fn": lambda p, x: {"a": x.mean((1, 2))}}, "pick one of several"),
        ({"apply_fn": lambda p, x: x.mean()}, "one floating-point array"),
        ({"apply_fn": lambda p, x: x.mean((1, 2))[:, :0]}, "one floating-point array"),
        ({"apply_fn": lambda p, x: np.asarray(x).mean((1, 2))}, "that JAX can trace, of jax.numpy"),
        ({"apply_fn": lambda p, x: x if x.sum() else -x}, "that JAX can trace, .* boolean"),
        ({"name": None}, "Expected name as a text"),
        ({"representation": ""}, "Expected representation as a text"),
        ({"dtype": jnp.float32}, "Unknown dtype .* Expected one of: bfloat16, float32"),
    ],
)
def test_from_fn_refuses_what_makes_no_sense(settings, message):
    settings = {
        "apply_fn": lambda p, x: x.mean((1, 2)),
        "params": {},
        "input_size": SIZE,
    } | settings
    with pytest.raises(UserError, match=message) as error:
        from_fn(settings.pop("apply_fn"), settings.pop("params"), **settings)
    assert "\n" not in str(error.value)


def test_params_may_be_numbers():
    """As in {"scale": 2.0}: they are parameters like arrays, compiled once for all values."""
    traces = []

    @jax.jit
    def run(encoder, images):
        traces.append(1)
        return encoder(images)

    def apply_fn(params, images):
        return images.mean((1, 2)) * params["scale"]

    for scale in (2.0, np.float64(3.0)):
        encoder = from_fn(apply_fn, {"scale": scale, "count": 3}, input_size=SIZE)
        expected = scale * np.asarray(_images()).mean((1, 2))
        np.testing.assert_allclose(run(encoder, _images()), expected, rtol=1e-5)
    assert len(traces) == 1


def test_later_changes_of_an_array_of_numpys_change_no_encoder():
    memory = np.ones(2**20 + 64, np.float32)
    for first in range(16):  # JAX keeps an array's memory as its own where it lies well for it
        weights = memory[first : first + 2**20]
        encoder = from_fn(lambda w, x: x.mean((1, 2)) * w[:3], weights, input_size=SIZE)
        weights[:] = 2.0
        assert float(encoder.params.max()) == 1.0
        weights[:] = 1.0


_GATE = [
    (lambda x: x * np.nan, "NaN or infinity"),
    (lambda x: x.at[1, 2, 3, 0].set(np.nan), "NaN or infinity"),
    (lambda x: x.at[0, 0, 0, 0].set(np.inf), "NaN or infinity"),
    (lambda x: 255 * x, "divide by 255"),
    (lambda x: 2 * x - 1, "normalise inside the encoder"),
    (lambda x: (255 * x).astype(jnp.uint8), "got uint8.*/ 255"),
    (lambda x: x.astype(jnp.bfloat16), "got bfloat16"),
    (lambda x: x.astype(jnp.float16), "got float16"),
    (lambda x: x > 0.5, "got bool"),
    (lambda x: x[0], r"\(B,8,6,3\)"),
    (lambda x: x.transpose(0, 3, 1, 2), r"\(B,8,6,3\)"),
    (lambda x: np.asarray(x).tolist(), "got list"),
    (lambda x: None, "got NoneType"),
]


@pytest.mark.parametrize("harm, message", _GATE)
def test_one_gate_for_images(harm, message):
    """A call on arrays and `check_images` refuse the same, in one line."""
    encoder = from_fn(lambda p, x: x.mean((1, 2)), {}, input_size=SIZE)
    images = harm(_images())
    for gate in (encoder, functools.partial(check_images, encoder)):
        with pytest.raises(UserError, match=message) as error:
            gate(images)
        assert "\n" not in str(error.value)


def test_the_gate_costs_nothing_under_jit():
    encoder = from_fn(lambda p, x: x.mean((1, 2)), {}, input_size=SIZE)
    jaxpr = str(jax.make_jaxpr(encoder)(_images()))
    assert "is_finite" not in jaxpr and " le " not in jaxpr and " ge " not in jaxpr
    with pytest.raises(UserError, match="bfloat16"):  # what a tracer has is looked at
        jax.jit(encoder)(_images().astype(jnp.bfloat16))
    np.testing.assert_allclose(
        encoder(np.float64(_images())), encoder(_images()), rtol=1e-6
    )  # NumPy's default dtype
