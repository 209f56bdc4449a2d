"""A network of PyTorch as a graph: its numbers are PyTorch's, and no pass changes them."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.encoders.bridge.export import export
from ur_jax.encoders.bridge.function import evaluate
from ur_jax.encoders.bridge.module import _picked
from ur_jax.encoders.bridge.passes import PASSES

torch = pytest.importorskip("torch")
torch_modules = pytest.importorskip("torch_modules")

SIZE = (32, 32)
FAST: dict[str, Any] = {"compiler_options": {"xla_backend_optimization_level": 0}}


@pytest.fixture(scope="module", params=list(torch_modules.CASES))
def network(request):
    """(name, module of one tensor, graphs and tensors before and after each pass)."""
    module = torch_modules.made(request.param)
    module = _picked(torch, module, SIZE, torch_modules.CASES[request.param][1], request.param)
    graphs = [tuple(export(module, SIZE, request.param))]
    for step in PASSES:
        graphs.append(step(*graphs[-1]))
    return request.param, module, graphs


def relative(got, want):
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


def test_representation_and_gradient_are_pytorchs_after_every_pass(network):
    name, module, graphs = network
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, *SIZE, 3)).astype(np.float32)
    given = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().requires_grad_(True)
    output = module(given)
    direction = rng.standard_normal(output.shape[1]).astype(np.float32)
    (output @ torch.from_numpy(direction)).sum().backward()
    want = output.detach().numpy()
    gradient = given.grad.permute(0, 2, 3, 1).numpy()

    def run(images, all_tensors):
        found = []
        for (graph, _), tensors in zip(graphs, all_tensors, strict=True):
            found.append(evaluate(graph, tensors, images))
        return found

    def projected(images, tensors):
        return (evaluate(graphs[-1][0], tensors, images) @ direction).sum()

    all_tensors = [tensors for _, tensors in graphs]
    for number, got in enumerate(jax.jit(run, **FAST)(images, all_tensors)):
        assert relative(got, want) < 1e-5, f"{name} after {number} passes"
    by_images = jax.jit(jax.grad(projected), **FAST)(images, graphs[-1][1])
    assert relative(by_images, gradient) < 1e-5


def test_what_the_passes_find(network):
    name, _, graphs = network
    before, after = (collections.Counter(n.op for n in g[0].nodes) for g in (graphs[0], graphs[-1]))
    (graph, tensors), first = graphs[-1], graphs[0][1]
    assert graph.per_image == (name == "one by one")
    if name == "convolutional":
        assert before["aten._native_batch_norm_legit_no_training.default"] == 4
        assert not after["aten._native_batch_norm_legit_no_training.default"]
        assert after["ur.affine"] == 1  # what no layer precedes
        assert after["ur.conv2d"] == 5
        assert after["aten.permute.default"] == 0  # images come, and go on, with channels last
    if name == "transformer":
        assert after["ur.attention"] == 2 and after["aten.layer_norm.default"] == 5
        shared = [n for n in tensors if n in ("first.weight", "second.weight")]
        assert len(shared) == 1
        assert not any("bicubic" in node.op for node in graph.nodes)  # computed once
    if name == "written":
        assert after["ur.normalize"] == 1 and after["aten.gelu.default"] == 1
        assert not after["aten.erf.default"]
    if name == "windows":
        assert after["ur.attention"] == 1
        # The table of relative positions is computed, and the mask with it.
        assert not after["aten.index.Tensor"]
        assert sum(t.size for t in tensors.values()) < 10 * sum(t.size for t in first.values())


def test_bfloat16_keeps_float32_where_it_matters(network):
    name, module, graphs = network
    if name != "written":
        return
    graph, tensors = graphs[-1]
    kinds = lambda v: jnp.bfloat16 if v.dtype == np.float32 else None
    narrow = {k: jnp.asarray(v, kinds(v)) for k, v in tensors.items()}
    images = np.random.default_rng(0).standard_normal((2, *SIZE, 3)).astype(np.float32)
    given = jnp.asarray(images, jnp.bfloat16)
    part = graph.replace(output=next(n.name for n in graph.nodes if n.op == "aten.rsqrt.default"))
    assert jax.eval_shape(lambda: evaluate(part, narrow, given)).dtype == jnp.float32
    part = graph.replace(output=next(n.name for n in graph.nodes if n.op == "aten.linear.default"))
    assert jax.eval_shape(lambda: evaluate(part, narrow, given)).dtype == jnp.bfloat16
    got = jax.jit(lambda p, x: evaluate(graph, p, x), **FAST)(narrow, given)
    with torch.no_grad():
        want = module(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert 1e-4 < relative(np.asarray(got, np.float32), want) < 3e-2
