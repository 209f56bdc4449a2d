"""Normalisations and GELUs that a module writes out are recognised, and become one operation.

    (x - mean) / sqrt(mean((x - mean)^2) + eps)        LayerNorm, over any axes
    0.5 x (1 + erf(x / sqrt 2))                        GELU

So they are computed in float32 also where all else is in bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ur_jax.encoders.bridge.graph import Graph, Node, Ref, Tensors, without_unused


def recognised(graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """Replaces the written-out forms."""
    known = {node.name: node for node in graph.nodes}
    nodes = []
    for node in graph.nodes:
        found = _normalisation(node, known) or _gelu(node, known)
        nodes.append(found or node)
    return without_unused(graph.replace(nodes=tuple(nodes)), tensors)


def _is(known: dict[str, Node], value: Any, *ops: str) -> Node | None:
    """The node of a reference, if it is one of these operations, without overloads."""
    node = known.get(value.name) if isinstance(value, Ref) else None
    return node if node is not None and node.op.rpartition(".")[0] in ops else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _normalisation(node: Node, known: dict[str, Node]) -> Node | None:
    """centred / sqrt(variance + eps), or times rsqrt."""
    name = node.op.rpartition(".")[0]
    if name == "aten.div":
        pairs = [(node.args["self"], _is(known, node.args["other"], "aten.sqrt"))]
    elif name == "aten.mul":
        self, other = node.args["self"], node.args["other"]
        pairs = [(self, _is(known, other, "aten.rsqrt")), (other, _is(known, self, "aten.rsqrt"))]
    else:
        return None
    for centred, root in pairs:
        if root is None or (inside := _is(known, root.args["self"], "aten.add")) is None:
            continue
        variance, eps = inside.args["self"], _number(inside.args["other"])
        if eps is None or inside.args.get("alpha", 1) != 1:
            continue
        sub = _is(known, centred, "aten.sub")
        axes = _axes_of_centred(sub, known)
        if sub is None or axes is None or not _is_variance(variance, sub, axes, known):
            continue
        args = {"self": sub.args["self"], "dim": list(axes), "eps": eps}
        return dataclasses.replace(node, op="ur.normalize", args=args)
    return None


def _axes(node: Node) -> tuple[int, ...] | None:
    """The axes of a mean or variance that keeps them, counted from the front."""
    dim, rank = node.args.get("dim"), len(node.shape or ())
    if not node.args.get("keepdim") or not dim or "dtype" in node.args:
        return None
    return tuple(sorted(d % rank for d in (dim if isinstance(dim, list) else [dim])))


def _axes_of_centred(sub: Node | None, known: dict[str, Node]) -> tuple[int, ...] | None:
    """The axes of x - mean(x)."""
    if sub is None or sub.args.get("alpha", 1) != 1:
        return None
    mean = _is(known, sub.args["other"], "aten.mean")
    if mean is None or mean.args["self"] != sub.args["self"]:
        return None
    return _axes(mean)


def _is_variance(value: Any, sub: Node, axes: tuple[int, ...], known: dict[str, Node]) -> bool:
    """Whether it is the biased variance of what is centred."""
    if var := _is(known, value, "aten.var"):
        return (
            var.args["self"] == sub.args["self"]
            and var.args.get("correction", 1) == 0
            and _axes(var) == axes
        )
    mean = _is(known, value, "aten.mean")
    if mean is None or _axes(mean) != axes:
        return False
    if square := _is(known, mean.args["self"], "aten.pow"):
        base, power = square.args["self"], _number(square.args["exponent"])
    elif square := _is(known, mean.args["self"], "aten.mul"):
        base, power = (
            square.args["self"],
            2.0 if square.args["self"] == square.args["other"] else None,
        )
    else:
        return False
    other = _is(known, base, "aten.sub")
    if power != 2.0 or other is None:
        return False
    is_same = other.name == sub.name or other.args == sub.args
    return is_same or (
        other.args["self"] == sub.args["self"] and _axes_of_centred(other, known) == axes
    )


def _gelu(node: Node, known: dict[str, Node]) -> Node | None:
    """The product of x, 1/2 and 1 + erf(x / sqrt 2), in any order."""
    if node.op.rpartition(".")[0] != "aten.mul":
        return None
    factors = _factors(node, known)
    halves = [f for f in factors if _number(f) == 0.5]
    ones = [f for f in factors if _is(known, f, "aten.add")]
    others = [f for f in factors if f not in halves and f not in ones]
    if len(factors) != 3 or not (len(halves) == len(ones) == len(others) == 1):
        return None
    x, one = others[0], _is(known, ones[0], "aten.add")
    if one is None or not isinstance(x, Ref):
        return None
    sides = (one.args["self"], one.args["other"])
    erf = _is(known, sides[0], "aten.erf") or _is(known, sides[1], "aten.erf")
    if erf is None or 1.0 not in map(_number, sides):
        return None
    if scaled := _is(known, erf.args["self"], "aten.div"):
        factor, source = _number(scaled.args["other"]), scaled.args["self"]
        factor = 1.0 / factor if factor else None
    elif scaled := _is(known, erf.args["self"], "aten.mul"):
        factor, source = _number(scaled.args["other"]), scaled.args["self"]
    else:
        return None
    if source != x or factor is None or abs(factor - math.sqrt(0.5)) > 1e-6:
        return None
    return dataclasses.replace(node, op="aten.gelu.default", args={"self": x})


def _factors(node: Node, known: dict[str, Node]) -> list[Any]:
    """The factors of a product of two or three."""
    first = [node.args["self"], node.args["other"]]
    for i, factor in enumerate(first):
        inner = _is(known, factor, "aten.mul")
        rest = first[1 - i]
        if inner is not None and (_number(inner.args["other"]) == 0.5 or _number(rest) == 0.5):
            return [inner.args["self"], inner.args["other"], rest]
    return first
