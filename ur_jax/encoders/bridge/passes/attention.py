"""Attention to `jax.nn.dot_product_attention`, whose axes are (batch, length, heads, width)."""

from __future__ import annotations

import dataclasses

from ur_jax.encoders.bridge.graph import Graph, Names, Node, Ref, Tensors
from ur_jax.encoders.bridge.passes.simplify import PERMUTE

_WHOLE = "aten.scaled_dot_product_attention.default"


def attention(graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """Replaces attention over (batch, heads, length, width) of one width."""
    names = Names(graph, tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shapes |= {node.name: node.shape for node in graph.nodes if node.shape is not None}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op != _WHOLE or not _fits(node, shapes):
            nodes.append(node)
            continue
        args = {}
        for key in ("query", "key", "value"):
            source = node.args[key]
            moved = Node(
                names.new(f"{node.name}/{key}"), PERMUTE, {"self": source, "dims": [0, 2, 1, 3]},
                _swapped(shapes[source.name]), node.place,
            )  # fmt: skip
            nodes.append(moved)
            args[key] = Ref(moved.name)
        args["mask"] = node.args.get("attn_mask")
        args["is_causal"] = node.args.get("is_causal", False)
        args["scale"] = node.args.get("scale")
        assert node.shape is not None
        result = Node(
            names.new(f"{node.name}/mixed"), "ur.attention", args, _swapped(node.shape), node.place
        )
        nodes.append(result)
        back = {"self": Ref(result.name), "dims": [0, 2, 1, 3]}
        nodes.append(dataclasses.replace(node, op=PERMUTE, args=back))
    return graph.replace(nodes=tuple(nodes)), tensors


def _fits(node: Node, shapes: dict) -> bool:
    """Whether JAX's attention takes it."""
    parts = [node.args[key] for key in ("query", "key", "value")]
    if not all(isinstance(x, Ref) and len(shapes.get(x.name) or ()) == 4 for x in parts):
        return False
    query, key, value = (shapes[x.name] for x in parts)
    mask = node.args.get("attn_mask")
    return (
        len({query[3], key[3], value[3]}) == 1
        and query[1] == key[1] == value[1]
        and not node.args.get("dropout_p")
        and (mask is None or (isinstance(mask, Ref) and mask.name in shapes))
        and node.shape is not None
    )


def _swapped(shape):
    return (shape[0], shape[2], shape[1], shape[3])
