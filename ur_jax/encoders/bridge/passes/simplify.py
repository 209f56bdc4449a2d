"""What changes nothing goes: copies, views of the same shape, permutations that undo each other."""

from __future__ import annotations

import dataclasses
from typing import Any

from ur_jax.encoders.bridge.graph import Graph, Node, Ref, Tensors, mapped, without_unused

_COPIES = ("clone", "contiguous", "alias", "detach", "lift_fresh_copy")
_COPIES = tuple(f"aten.{name}.default" for name in _COPIES)
_VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default",
          "aten.expand.default")  # fmt: skip
PERMUTE = "aten.permute.default"


def simplified(graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """Removes what changes nothing, and what nobody reads."""
    shapes: dict[str, Any] = {name: tensor.shape for name, tensor in tensors.items()}
    kept: dict[str, Node] = {}
    same: dict[str, Ref] = {}
    for node in graph.nodes:
        args = mapped(node.args, lambda ref: same.get(ref.name, ref))
        node = _as_permutation(dataclasses.replace(node, args=args), shapes)
        shapes[node.name] = node.shape
        if node.op == PERMUTE:
            node = _composed(node, kept)
        if node.op == "aten.sym_size.int":
            node = _size_before(node, kept)
        if (target := _unchanged(node, shapes)) is not None:
            same[node.name] = target
        else:
            kept[node.name] = node
    output = same.get(graph.output, Ref(graph.output)).name
    return without_unused(graph.replace(nodes=tuple(kept.values()), output=output), tensors)


def _as_permutation(node: Node, shapes: dict[str, Any]) -> Node:
    """A transposition as a permutation, with axes counted from the front."""
    rank = len(node.shape) if node.shape is not None else None
    if rank is None:
        return node
    if node.op == PERMUTE:
        dims = [d % rank for d in node.args["dims"]]
    elif node.op == "aten.transpose.int" and rank:
        dims, (a, b) = list(range(rank)), (node.args["dim0"] % rank, node.args["dim1"] % rank)
        dims[a], dims[b] = b, a
    elif node.op == "aten.t.default":
        dims = list(range(rank))[::-1]
    else:
        return node
    return dataclasses.replace(node, op=PERMUTE, args={"self": node.args["self"], "dims": dims})


def _composed(node: Node, kept: dict[str, Node]) -> Node:
    """A permutation of a permutation as one."""
    before = kept.get(node.args["self"].name)
    if before is None or before.op != PERMUTE:
        return node
    dims = [before.args["dims"][d] for d in node.args["dims"]]
    args = {"self": before.args["self"], "dims": dims}
    return dataclasses.replace(node, args=args)


def _size_before(node: Node, kept: dict[str, Node]) -> Node:
    """A size of a permutation as one of what is permuted."""
    before = kept.get(node.args["self"].name)
    if before is None or before.op != PERMUTE:
        return node
    args = {"self": before.args["self"], "dim": before.args["dims"][node.args["dim"]]}
    return dataclasses.replace(node, args=args)


def _unchanged(node: Node, shapes: dict[str, Any]) -> Ref | None:
    """What a node is equal to, if it changes nothing."""
    if node.op in _COPIES and isinstance(node.args["self"], Ref):
        return node.args["self"]
    if node.op == PERMUTE and node.args["dims"] == list(range(len(node.args["dims"]))):
        return node.args["self"]
    if node.op in _VIEWS and isinstance(node.args["self"], Ref):
        shape = shapes.get(node.args["self"].name)
        if shape is not None and shape == node.shape and sum(n is None for n in shape) <= 1:
            return node.args["self"]
    return None
