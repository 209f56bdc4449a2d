"""BatchNorm folded into the convolution or linear layer before it; elsewhere one scale and shift.

With s = gain / sqrt(var + eps): weight <- weight * s, bias <- (bias - mean) * s + shift.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ur_jax.encoders.bridge.graph import Graph, Names, Node, Ref, Tensors, uses, without_unused

_NORM = "aten._native_batch_norm_legit_no_training.default"
_LAYERS = {
    "aten.convolution.default": ("weight", "input"),
    "aten.linear.default": ("weight", "input"),
}


def fold_batch_norm(graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """Folds every BatchNorm whose statistics are tensors of the graph."""
    names, users = Names(graph, tensors), uses(graph)
    tensors, kept = dict(tensors), {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        if node.op != _NORM:
            continue
        scale_shift = _scale_shift(node, tensors)
        results = users.get(node.name, [])
        if scale_shift is None or any(r.op != "ur.getitem" or r.args["index"] for r in results):
            continue
        layer = kept.get(node.args["input"].name)
        into = _folded(layer, scale_shift, tensors, names, users, node)
        for result in results:
            if into is not None and layer is not None:
                kept[layer.name] = into
                kept[result.name] = Node(
                    result.name, "aten.alias.default", {"self": Ref(layer.name)}, result.shape
                )
            else:
                scale, shift = (names.new(f"{node.name}/{what}") for what in ("scale", "shift"))
                tensors |= {scale: scale_shift[0], shift: scale_shift[1]}
                args = {"self": node.args["input"], "scale": Ref(scale), "shift": Ref(shift)}
                kept[result.name] = dataclasses.replace(
                    result, op="ur.affine", args={**args, "axis": 1}
                )
    return without_unused(graph.replace(nodes=tuple(kept.values())), tensors)


def open_batch_norm(graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """Makes every BatchNorm one operation of its own tensors, as training wants it."""
    users, kept = uses(graph), {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        results = users.get(node.name, [])
        if node.op != _NORM or any(r.op != "ur.getitem" or r.args["index"] for r in results):
            continue
        names = {"self": "input", "weight": "weight", "bias": "bias"}
        names |= {"mean": "running_mean", "var": "running_var", "eps": "eps"}
        args = {new: node.args[old] for new, old in names.items() if node.args.get(old) is not None}
        for result in results:
            kept[result.name] = dataclasses.replace(
                result, op="ur.batch_norm", args={**args, "axis": 1}
            )
    return without_unused(graph.replace(nodes=tuple(kept.values())), tensors)


def _scale_shift(node: Node, tensors: Tensors) -> tuple[np.ndarray, np.ndarray] | None:
    """A BatchNorm as one scale and shift; None if its statistics are no tensors."""
    values = {}
    for key in ("weight", "bias", "running_mean", "running_var"):
        value = node.args.get(key)
        if value is None:
            values[key] = 1.0 if key == "weight" else 0.0
        elif isinstance(value, Ref) and value.name in tensors:
            values[key] = tensors[value.name].astype(np.float64)
        else:
            return None
    scale = values["weight"] / np.sqrt(values["running_var"] + node.args["eps"])
    shift = values["bias"] - values["running_mean"] * scale
    return scale.astype(np.float32), shift.astype(np.float32)


def _folded(
    layer: Node | None,
    scale_shift: tuple[np.ndarray, np.ndarray],
    tensors: Tensors,
    names: Names,
    users: dict[str, list[Node]],
    norm: Node,
) -> Node | None:
    """The layer with the BatchNorm in it; its new weights are added to `tensors`."""
    if layer is None or layer.op not in _LAYERS or len(users[layer.name]) > 1:
        return None
    is_linear = layer.op == "aten.linear.default"
    if layer.args.get("transposed") or (is_linear and len(layer.shape or ()) != 2):
        return None
    weight, bias = layer.args["weight"], layer.args.get("bias")
    held = lambda x: isinstance(x, Ref) and x.name in tensors
    if not held(weight) or not (bias is None or held(bias)):
        return None
    scale, shift = (x.astype(np.float64) for x in scale_shift)
    kernel = tensors[weight.name].astype(np.float64)
    kernel = kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1))
    added = shift if bias is None else tensors[bias.name].astype(np.float64) * scale + shift
    stem = weight.name.removesuffix(".weight")
    new: dict[str, Any] = {}
    for key, value in (("weight", kernel), ("bias", added)):
        name = names.new(f"{stem}/folded.{key}")
        tensors[name] = value.astype(np.float32)
        new[key] = Ref(name)
    return dataclasses.replace(layer, args={**layer.args, **new})
