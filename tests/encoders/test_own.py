"""A user's own encoder: made by a function, of linen and nnx modules, saved and loaded again."""

from __future__ import annotations

import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ur_jax
from ur_jax.encoders import factories, loading
from ur_jax.errors import UserError

SIZE = (8, 6)
IMAGES = np.random.default_rng(0).random((3, *SIZE, 3), np.float32)

SOURCE = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import ur_jax

class Net(nn.Module):
    width: int
    output: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x)).mean((1, 2))
        y = nn.Dense(5)(x)
        return x if self.output == "pooled" else y

def make(width=4, representation="pooled", dtype="float32"):
    images = jnp.zeros((1, 8, 6, 3))
    variables = Net(width, "logits").init(jax.random.key(width), images)
    return ur_jax.from_linen(
        Net(width, representation), variables, input_size=(8, 6), name="mine",
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), preparation="resize_crop",
        representation=representation, dtype=dtype,
    )

def apply(params, images):
    return images.mean((1, 2)) @ params["w"] * params["scale"]

def plain():
    return ur_jax.from_fn(apply, {"scale": 2.0, "w": jnp.eye(3)}, input_size=(8, 6))

def stubborn(representation="paper", dtype="float32"):
    return plain()

def no_encoder():
    return apply, {}

def needy(width):
    return plain()

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """A file of the user's, by a name that no other test has; the current folder is its own."""
    name = f"mine_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def _twin(encoder, images):
    """The encoder by NumPy, from its parameters."""
    params = jax.tree.map(np.float64, encoder.params["params"])
    x = (np.float64(images) - encoder.mean) / encoder.std
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["Conv_0"]["kernel"]
    y = sum(x[:, i : i + 8, j : j + 6] @ kernel[i, j] for i in range(3) for j in range(3))
    pooled = np.maximum(y + params["Conv_0"]["bias"], 0).mean((1, 2))
    return pooled, pooled @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


def test_a_function_named_by_its_place_makes_the_encoder(module):
    by_module = loading.load_encoder(f"{module}:make")
    by_file = loading.load_encoder(f"{module}.py:make,width=7")
    logits = loading.load_encoder(f"{module}.py:make", representation="logits", dtype="bfloat16")
    assert (by_module.dimension, by_file.dimension, logits.dimension) == (4, 7, 5)
    assert (logits.representation, logits.dtype) == ("logits", "bfloat16")
    # What a probe asks for is what the function makes by itself.
    assert loading.load_encoder(f"{module}:make", representation="features").dimension == 4
    for encoder in (by_module, by_file):
        pooled, _ = _twin(encoder, IMAGES)
        np.testing.assert_allclose(encoder(IMAGES), pooled, rtol=1e-4, atol=1e-5)
    exact = _twin(logits, IMAGES)[1]
    assert np.abs(logits(IMAGES) - exact).max() < 0.05 * np.abs(exact).max()
    assert loading.is_own(f"{module}:make") and not loading.is_own("demo")


@pytest.mark.parametrize(
    "place, settings, message",
    [
        ("{m}.py:mak", {}, "Unknown name in .* 'mak'; did you mean 'make'"),
        ("{m}:number", {}, "Expected a function at .*:number, got int"),
        ("{m}:no_encoder", {}, "to return an Encoder, got tuple"),
        ("{m}:plain", {"dtype": "bfloat16"}, "of dtype 'bfloat16', got 'float32'; have it take"),
        ("{m}:plain", {"representation": "logits"}, "of representation 'logits', got 'paper'"),
        ("{m}:stubborn", {"dtype": "bfloat16"}, "of dtype 'bfloat16', got 'float32'"),
        ("{m}:stubborn", {"representation": "x"}, "of representation 'x', got 'paper'"),
        ("{m}:make,widht=3", {}, "takes no argument 'widht', but width"),
        ("{m}:make,width", {}, "arguments as name=value .*, got 'width'"),
        ("{m}:needy", {}, "needs width; give it as .*:needy,width=VALUE"),
        ("{m}:make", {"name": "mocov2"}, "Expected no name with the function"),
        ("{m}.py", {"name": None}, r"the function in .*: .*\.py:make"),
        ("nowhere.py:make", {}, "There is no file nowhere.py"),
        ("nowhere.at_all:make", {}, "There is no module 'nowhere.at_all'"),
    ],
)
def test_what_a_place_cannot_give_is_said_in_one_line(module, place, settings, message):
    with pytest.raises(UserError, match=message) as error:
        loading.load_encoder(place.format(m=module), **settings)
    assert "\n" not in str(error.value)


def test_an_own_encoder_is_saved_and_loaded(module, tmp_path):
    made = loading.load_encoder(f"{module}.py:make,width=6")
    trained = made.replace(params=jax.tree.map(lambda x: 2 * x, made.params), name="tuned")
    ur_jax.save_encoder(tmp_path / "saved", trained)
    restored = loading.load_encoder(tmp_path / "saved")
    np.testing.assert_array_equal(restored(IMAGES), trained(IMAGES))
    kept = ("name", "mean", "std", "input_size", "preparation", "representation", "dimension")
    assert all(getattr(restored, name) == getattr(trained, name) for name in kept)
    assert restored.apply_fn == made.apply_fn  # nothing is compiled anew
    assert restored.origin.arguments == {"width": 6}
    logits = loading.load_encoder(tmp_path / "saved", representation="logits")
    np.testing.assert_allclose(logits(IMAGES), _twin(trained, IMAGES)[1], rtol=1e-4, atol=1e-4)
    assert loading.is_own(tmp_path / "saved")
    with pytest.raises(UserError, match="one of your own"):
        loading.load_variables(tmp_path / "saved")


def test_a_factory_that_is_not_here_gives_one_error(module, tmp_path, monkeypatch):
    encoder = loading.load_encoder(f"{module}.py:plain")
    ur_jax.save_encoder(tmp_path / "gone", encoder, factory="/elsewhere/gone.py:make")
    with pytest.raises(UserError, match=r"saved|gone.*gone\.py:make makes, and that is not here"):
        loading.load_encoder(tmp_path / "gone")
    named = loading.load_encoder(tmp_path / "gone", factory=f"{module}.py:plain")
    np.testing.assert_array_equal(named(IMAGES), encoder(IMAGES))
    # The file may have come along, to another folder.
    ur_jax.save_encoder(tmp_path / "moved", encoder, factory=f"/elsewhere/{module}.py:plain")
    np.testing.assert_array_equal(loading.load_encoder(tmp_path / "moved")(IMAGES), named(IMAGES))

    nameless = ur_jax.from_fn(lambda p, x: x.mean((1, 2)) @ p, jnp.eye(3), input_size=SIZE)
    ur_jax.save_encoder(tmp_path / "nameless", nameless)
    with pytest.raises(UserError, match="saved without the function that makes it"):
        loading.load_encoder(tmp_path / "nameless")
    with pytest.raises(UserError, match="does not fit what .*:plain makes: 2 missing"):
        loading.load_encoder(tmp_path / "nameless", factory=f"{module}:plain")
    with pytest.raises(UserError, match="Expected a checkpoint of an own encoder with factory"):
        loading.load_encoder("demo", factory=f"{module}:plain")


def test_a_checkpoint_calls_no_function_that_is_none_of_ours(module, tmp_path):
    encoder = loading.load_encoder(f"{module}.py:plain")
    ur_jax.save_encoder(tmp_path / "x", encoder, factory="os:mkdir", arguments={"path": "made"})
    with pytest.raises(UserError, match="os:mkdir is of a module that does not use ur_jax"):
        loading.load_encoder(tmp_path / "x")
    assert not (tmp_path / "made").exists()


def test_an_encoder_that_ships_is_saved_as_it_is(tmp_path):
    encoder = loading.load_encoder("demo")
    ur_jax.save_encoder(tmp_path / "demo", encoder)
    restored = loading.load_encoder(tmp_path / "demo")
    assert loading.weights_hash(restored) == loading.weights_hash(encoder)
    assert restored.apply_fn == encoder.apply_fn
    with pytest.raises(UserError, match="BatchNorm folded"):
        loading.load_variables(tmp_path / "demo")


class _Linen(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(self.width, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(0.5, deterministic=not train)(x).mean((1, 2))


class _Nnx(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs)])

    def __call__(self, x):
        x = self.dropout(self.norm(self.conv(x))).mean((1, 2))
        return self.layers[0](x)


def _linen(seed):
    variables = _Linen().init(jax.random.key(seed), IMAGES, train=False)
    return ur_jax.from_linen(_Linen(), variables, input_size=SIZE)


def _nnx(seed):
    return ur_jax.from_nnx(_Nnx(4, nnx.Rngs(seed)), input_size=SIZE)


@pytest.mark.parametrize("make", [_linen, _nnx])
def test_flax_modules_are_put_to_inference_and_equal_ones_compiled_once(make):
    traces = []

    @jax.jit
    def represent(encoder, images):
        traces.append(1)
        return encoder(images)

    first, second = make(0), make(1)
    whole = represent(first, IMAGES)
    assert np.abs(whole - represent(second, IMAGES)).max() > 0.01 and len(traces) == 1
    # Neither Dropout nor the other images of the batch.
    np.testing.assert_allclose(represent(first, IMAGES[:1]), whole[:1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(represent(first, IMAGES), whole)
    assert jax.grad(lambda x: first(x).sum())(jnp.asarray(IMAGES)).shape == IMAGES.shape


def test_from_nnx_leaves_the_model_in_its_mode():
    model = _Nnx(4, nnx.Rngs(0))
    encoder = ur_jax.from_nnx(model, input_size=SIZE)
    assert not model.norm.use_running_average and not model.dropout.deterministic
    model.eval()
    np.testing.assert_allclose(encoder(IMAGES), model(jnp.asarray(IMAGES)), rtol=1e-5, atol=1e-6)


def test_modules_that_are_no_encoders():
    variables = _Linen().init(jax.random.key(0), IMAGES, train=False)
    with pytest.raises(UserError, match="inference mode, but it changes its own variables"):
        ur_jax.from_linen(_Linen(), variables, input_size=SIZE, keywords={"train": True})
    with pytest.raises(UserError, match="linen module, got _Nnx; `from_nnx`"):
        ur_jax.from_linen(_Nnx(4, nnx.Rngs(0)), variables, input_size=SIZE)
    with pytest.raises(UserError, match="nnx module, got _Linen; `from_linen`"):
        ur_jax.from_nnx(_Linen(), input_size=SIZE)


def test_places():
    assert all(map(factories.is_place, ("a.py:make", "a.b:make", "d/a.py:make,width=3")))
    assert not any(map(factories.is_place, ("a.py", "gs://a/b", "demo", "a/b:make", "C:x y")))
    parsed = factories.split_arguments("a.py:make,width=3,sizes=(1;2),name=x,flag=True")
    assert parsed == ("a.py:make", {"width": 3, "sizes": "(1;2)", "name": "x", "flag": True})
