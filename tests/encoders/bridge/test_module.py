"""`from_torch`, its checkpoints, what is refused, and files that cannot be trusted."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ur_jax
from ur_jax.encoders import checkpoints
from ur_jax.encoders.bridge import GraphFn, from_torch
from ur_jax.encoders.bridge.checkpoint import check_before
from ur_jax.encoders.bridge.graph import dumps, loads
from ur_jax.encoders.loading import described
from ur_jax.errors import UserError

torch = pytest.importorskip("torch")
nn = torch.nn
IMAGES = np.random.default_rng(0).random((3, 16, 16, 3)).astype(np.float32)


def network(*layers):
    torch.manual_seed(0)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), *layers, *pooled, nn.Linear(6, 5)).eval()


@pytest.fixture(scope="module")
def module():
    return network(nn.BatchNorm2d(6), nn.GELU())


@pytest.fixture(scope="module")
def encoder(module):
    return from_torch(module, input_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, name="net")


def test_is_pytorchs_with_normalisation_inside(module, encoder):
    normalised = torch.from_numpy((IMAGES - 0.5) / 0.25).permute(0, 3, 1, 2)
    with torch.no_grad():
        want = module(normalised).numpy()
    np.testing.assert_allclose(encoder(IMAGES), want, rtol=1e-5, atol=1e-6)
    assert (encoder.dimension, encoder.representation, encoder.name) == (5, "output", "net")
    assert set(encoder.params) == {
        "0/folded.weight/hwio", "0/folded.bias", "5.weight", "5.bias"
    }  # fmt: skip


def test_a_checkpoint_needs_no_pytorch(tmp_path, encoder):
    path = tmp_path / "net"
    ur_jax.save_encoder(path, encoder)
    np.save(tmp_path / "images.npy", IMAGES)
    code = f"""
import sys

class Removed:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(name)

sys.meta_path.insert(0, Removed())
import numpy as np, ur_jax
e = ur_jax.load_encoder({str(path)!r})
np.save({str(tmp_path / "out.npy")!r}, e(np.load({str(tmp_path / "images.npy")!r})))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encoder(IMAGES), rtol=1e-4, atol=1e-5)
    loaded = ur_jax.load_encoder(path)
    assert loaded.apply_fn == encoder.apply_fn and described(loaded) == described(encoder)
    assert ur_jax.load_encoder(path, dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(UserError, match="--output backbone"):
        ur_jax.load_encoder(path, representation="backbone")


def test_other_weights_of_the_network_compile_nothing_anew(encoder):
    count = []

    @jax.jit
    def run(encoder, images):
        count.append(1)
        return encoder(images)

    other = from_torch(
        network(nn.BatchNorm2d(6), nn.GELU()), input_size=(16, 16), mean=(0.5,) * 3,
        std=(0.25,) * 3, name="net", check=False,
    )  # fmt: skip
    run(encoder, IMAGES), run(other, IMAGES)
    assert len(count) == 1


def test_training_mode_is_ended_and_said():
    module = network(nn.Dropout(0.5))
    module.train()
    with pytest.warns(UserWarning, match="was in training mode"):
        from_torch(module, input_size=(16, 16))
    assert module.training and all(m.training for m in module.modules())


class Several(nn.Module):
    def forward(self, x):
        return {"map": x, "tokens": x.flatten(2).transpose(1, 2), "text": "no tensor"}


class Depends(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.layer(x.permute(0, 3, 1, 2)).mean((2, 3))


class Exotic(nn.Module):
    def forward(self, x):
        return torch.special.i0(torch.lgamma(x.mean((2, 3)) + 9.0))


@pytest.mark.parametrize(
    "module, settings, message",
    [
        (Several(), {}, r"several results for 2 images, map \[2, 3, 16, 16\], tokens"),
        (Several(), {"output": "pooled"}, "has no output 'pooled'; it gives map"),
        (Several(), {"output": "map"}, r"choose by output='map.mean' or 'map.flat'"),
        (Several(), {"output": "tokens.clss"}, "did you mean 'cls'"),
        (Depends(), {}, "depend on data"),
        (Exotic(), {}, r"aten.i0.default \(1 times, first in.*aten.lgamma.default"),
        (nn.Conv2d(1, 2, 3), {}, r"takes images of 1 channel"),
        (nn.Linear(7, 2), {}, "does not take images"),
        (Last(), {}, r"if it wants \(B,H,W,3\)"),
        (lambda x: x, {}, "Expected a torch.nn.Module"),
    ],
)
def test_what_is_refused(module, settings, message):
    with pytest.raises(UserError, match=message):
        from_torch(module, input_size=(16, 16), **settings)


def test_weights_that_are_not_finite_are_refused():
    module = network()
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        from_torch(module, input_size=(16, 16))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.arange(3.0).view(3, 1, 1))
        self.images = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return ((x - self.mean) * self.images).mean((2, 3))


def test_tensors_may_have_the_names_of_operations():
    encoder = from_torch(Named(), input_size=(16, 16), check=False)
    np.testing.assert_allclose(encoder(IMAGES), IMAGES.mean((1, 2)) - [0, 1, 2], rtol=1e-5)


def test_outputs_are_pooled_and_normalised():
    encoder = from_torch(Several(), input_size=(16, 16), output="tokens.mean.normalized")
    want = IMAGES.mean((1, 2))
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder(IMAGES), want, rtol=1e-5)
    assert encoder.representation == "tokens.mean.normalized"


def tampered(encoder, change):
    """Metadata and shapes of a checkpoint whose graph was changed."""
    graph = json.loads(encoder.apply_fn.text)
    change(graph)
    kept = ("name", "input_size", "preparation", "mean", "std", "representation", "dtype")
    bridge = {"graph": graph, "leaves": sorted(encoder.params)}
    bridge |= {field: getattr(encoder, field) for field in kept}
    shapes = {f"leaf{i:05d}": encoder.params[name] for i, name in enumerate(sorted(encoder.params))}
    return {"bridge": bridge}, shapes


def node(graph, op, **args):
    graph["nodes"].append(["added", op, args])
    graph["output"] = "added"


HUGE = 2**40
EXPANDED = [HUGE, -1, 16, 16, 3]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: None, None),
        (lambda g: node(g, "os.system", command="true"), "no operation of the table"),
        (lambda g: node(g, "aten.relu.default", self={"ref": "nowhere"}), "not before it"),
        (lambda g: node(g, "aten.relu.default", other=1), "are not those of"),
        (lambda g: node(g, "aten.full.default", size=[HUGE], fill_value=1), "more than"),
        (lambda g: node(g, "aten.expand.default", self={"ref": "%"}, size=EXPANDED),
         "more than"),
        (lambda g: node(g, "aten.mm.default", self={"ref": "%"}, mat2=3), "fit together"),
        (lambda g: node(g, "aten.relu.default", self={"what": 1}), "no value"),
        (lambda g: g.update(format=99), "format 1, got 99"),
        (lambda g: g.pop("nodes"), "lacks a field"),
        (lambda g: g["nodes"].append(g["nodes"][0]), "there twice"),
        (lambda g: g["tensors"]["5.bias"].__setitem__(1, [HUGE]), "not those of its graph"),
        (lambda g: g.update(output="nothing"), "no output"),
    ],
)  # fmt: skip
def test_a_graph_is_not_trusted(encoder, change, message):
    metadata, shapes = tampered(encoder, change)
    if message is None:
        check_before(metadata, shapes)
        return
    with pytest.raises(UserError, match=message):
        check_before(metadata, shapes)


def test_weights_of_another_shape_take_no_memory(tmp_path, encoder, monkeypatch):
    ur_jax.save_encoder(tmp_path / "net", encoder)
    monkeypatch.setattr(checkpoints.np, "empty", lambda *a: pytest.fail("memory was taken"))

    def refuse(metadata, shapes):
        raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        checkpoints.restore_encoder(tmp_path / "net", before=refuse)


def test_a_graphs_text_is_read_as_it_was_written(encoder):
    graph, tensors = loads(encoder.apply_fn.text)
    shapes = {k: jax.ShapeDtypeStruct(shape, kind) for k, (kind, shape) in tensors.items()}
    assert dumps(graph, shapes) == encoder.apply_fn.text
    assert isinstance(encoder.apply_fn, GraphFn) and len(graph.nodes) == 6
    assert jnp.shape(encoder.params["5.weight"]) == tensors["5.weight"][1]
