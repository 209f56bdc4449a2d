"""What determines an encoder's numbers is in its identity, and nothing else is."""

from __future__ import annotations

import functools
import importlib.util
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ur_jax.encoders import from_fn, from_linen, from_nnx, loading
from ur_jax.encoders.networks import resnet
from ur_jax.encoders.networks.network import Network, NetworkFn

SIZE = (8, 6)
WEIGHTS = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def _apply(params, images):
    return images.mean((1, 2)) @ params


def _make(apply_fn=_apply, params=WEIGHTS, **settings):
    return from_fn(apply_fn, params, **{"input_size": SIZE, **settings})


@pytest.mark.parametrize(
    "change",
    [
        {"std": (0.5, 0.5, 0.4)},
        {"mean": (0.1, 0.0, 0.0)},
        {"input_size": (8, 8)},
        {"preparation": "resize_crop"},
        {"representation": "other"},
        {"dtype": "bfloat16"},
        {"name": "other"},
        {"params": 2 * WEIGHTS},
    ],
)
def test_each_setting_is_in_the_identity(change):
    before, after = loading.described(_make()), loading.described(_make(**change))
    assert before != after
    assert json.loads(json.dumps(before)) == before == loading.described(_make())


def _closed_over(weights, scale=1.0, activation=jnp.tanh):
    def apply_fn(params, images):
        return activation(images.mean((1, 2)) @ weights * scale * params)

    return apply_fn


class _Holder:
    def __init__(self, weights):
        self.weights = weights

    def apply(self, params, images):
        return images.mean((1, 2)) @ self.weights * params


def _unnamed():
    return (lambda p, x: x.mean((1, 2)) * 2.0 * p), (lambda p, x: x.mean((1, 2)) * 3.0 * p)


_FUNCTIONS = {
    "array in a closure": (_closed_over(WEIGHTS), _closed_over(WEIGHTS + 1)),
    "number in a closure": (_closed_over(WEIGHTS), _closed_over(WEIGHTS, 2.0)),
    "function in a closure": (_closed_over(WEIGHTS), _closed_over(WEIGHTS, activation=jax.nn.relu)),
    "array in an object": (_Holder(WEIGHTS).apply, _Holder(2 * WEIGHTS).apply),
    "argument": tuple(
        functools.partial(lambda p, x, k: x.mean((1, 2)) * p**k, k=k) for k in (1, 2)
    ),
    "lambdas of one line": _unnamed(),
    "under jit": (jax.jit(_closed_over(WEIGHTS)), jax.jit(_closed_over(WEIGHTS + 1))),
}


@pytest.mark.parametrize("case", _FUNCTIONS)
def test_what_a_function_has_in_it_is_in_the_identity(case):
    first, second = (_make(fn, 1.0) for fn in _FUNCTIONS[case])
    assert loading.described(first)["network"] != loading.described(second)["network"]


def test_equal_functions_have_equal_identities():
    """Made anew, with arrays of JAX or of NumPy: nothing that another run would change."""
    fns = (_closed_over(WEIGHTS.copy()), _closed_over(jnp.asarray(WEIGHTS)))
    assert len({loading.described(_make(fn, 1.0))["network"] for fn in fns}) == 1


def _file(folder, body):
    """The encoder of a file with a helper and a global number."""
    path = folder / "module.py"
    path.write_text(body)
    spec = importlib.util.spec_from_file_location(f"file_{folder.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return loading.described(_make(module.apply, 1.0))["network"]


_BODY = """
SCALE = 2.0

def helper(x):
    return x * SCALE

def apply(params, images):
    return helper(images.mean((1, 2))) * params
"""


def test_comments_change_nothing_and_code_does(tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        folder.mkdir()
    texts = (
        _BODY,
        "# with a comment\n" + _BODY.replace("SCALE\n", "SCALE  # and another\n\n"),
        _BODY.replace("SCALE = 2.0", "SCALE = 3.0"),
        _BODY.replace("x * SCALE", "x + SCALE"),
    )
    hashes = [_file(*case) for case in zip(folders, texts)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


class _Linen(nn.Module):
    activation: object = nn.relu

    @nn.compact
    def __call__(self, x):
        return self.activation(nn.Dense(4)(x.mean((1, 2))))


class _Nnx(nnx.Module):
    def __init__(self, activation, rngs):
        self.layer, self.activation = nnx.Linear(3, 4, rngs=rngs), activation
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.activation(self.dropout(self.layer(x.mean((1, 2)))))


def _linen(activation, seed):
    module = _Linen(activation)
    variables = module.init(jax.random.key(seed), jnp.zeros((1, *SIZE, 3)))
    return from_linen(module, variables, input_size=SIZE)


def _nnx(activation, seed):
    return from_nnx(_Nnx(activation, nnx.Rngs(seed)), input_size=SIZE)


@pytest.mark.parametrize("make", [_linen, _nnx])
def test_modules_are_known_by_their_architecture(make):
    described = [
        loading.described(make(fn, seed)) for fn, seed in ((nn.relu, 0), (nn.relu, 1), (nn.tanh, 0))
    ]
    networks, weights = ([d[k] for d in described] for k in ("network", "weights_sha256"))
    assert networks[0] == networks[1] != networks[2]
    assert weights[0] == weights[2] != weights[1]


def test_the_networks_of_the_package_are_known_by_their_fields():
    def network(stem):
        module = Network(resnet.ResNet((1,), resnet.BasicBlock, width=4, stem=stem))
        variables = module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        fn = NetworkFn(module, "backbone")
        return loading.described(_make(fn, variables, input_size=(16, 16)))["network"]

    assert network("cifar") == network("cifar") != network("imagenet")


def test_a_place_is_no_part_of_it():
    encoder = _make()
    there = encoder.replace(origin=type(encoder.origin)("elsewhere.py:make", {}))
    assert loading.described(there) == loading.described(encoder)
