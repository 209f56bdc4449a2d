"""The interpreter: a graph as a pure function of parameters and images. It needs no PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ur_jax.encoders.bridge.graph import Graph, loads, mapped
from ur_jax.encoders.bridge.ops import ROWS
from ur_jax.errors import UserError
from ur_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class GraphFn:
    """(params, normalised images (B,H,W,3)) -> (B,D); equal for equal graphs.

    Attributes:
      text: the graph, as `graph.dumps` gives it.
    """

    text: str

    def __call__(self, params: PyTree, images: Array) -> Array:
        graph, _ = loads(self.text)
        narrow = lambda x: x.astype(images.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return evaluate(graph, jax.tree.map(narrow, flat(params)), images)

    def __repr__(self) -> str:
        graph, tensors = loads(self.text)
        return f"GraphFn({len(graph.nodes)} operations, {len(tensors)} tensors)"


def flat(params: PyTree) -> Mapping[str, Any]:
    """The tensors of a graph by name: of an encoder to be trained from its two collections."""
    if set(params) == {"params", "buffers"} and isinstance(params["params"], Mapping):
        return {**params["params"], **params["buffers"]}
    return params


def collected(graph: Graph, tensors: Mapping[str, Any]) -> PyTree:
    """The inverse of `flat`: of a graph that knows its parameters {"params", "buffers"}."""
    if not graph.keys:
        return tensors
    is_trained = lambda name: name in graph.trained
    return {
        "params": {name: x for name, x in tensors.items() if is_trained(name)},
        "buffers": {name: x for name, x in tensors.items() if not is_trained(name)},
    }


def evaluate(
    graph: Graph, params: Mapping[str, Any], images: Array, *, largest: int | None = None
) -> Array:
    """Evaluates a graph, node by node, on images (B,H,W,3).

    Args:
      graph: the graph.
      params: its tensors by name.
      images: normalised, of the dtype to compute in.
      largest: number of elements that no result may have more of; for a graph not yet trusted.

    Raises:
      UserError: for a larger result.
    """
    if graph.per_image:
        single = graph.replace(per_image=False)
        one = lambda image: evaluate(single, params, image[None], largest=largest)[0]
        return jax.vmap(one)(images)
    values: dict[str, Any] = {**params, graph.input: images}
    for node, dead in zip(graph.nodes, _dead_after(graph), strict=True):
        args = mapped(node.args, lambda ref: values[ref.name])
        # Masks, counts and numbers meet floating point as they do in PyTorch.
        with jax.numpy_dtype_promotion("standard"):
            values[node.name] = ROWS[node.op](**args)
        if largest is not None:
            _check_sizes(values[node.name], largest, node.name)
        for name in dead:
            del values[name]
    return values[graph.output]


def _check_sizes(result: Any, largest: int, name: str) -> None:
    for leaf in jax.tree.leaves(result):
        if math.prod(jnp.shape(leaf)) > largest:
            raise UserError(
                f"The network's graph makes an array {list(jnp.shape(leaf))} at {name!r}, more "
                f"than {largest} elements; it is not one that was converted from a network."
            )


@functools.lru_cache(maxsize=64)
def _last_uses(nodes: tuple[tuple[str, tuple[str, ...]], ...], output: str):
    last = {}
    for number, (name, refs) in enumerate(nodes):
        last[name] = number
        last.update(dict.fromkeys(refs, number))
    last.pop(output, None)
    dead: list[list[str]] = [[] for _ in nodes]
    for name, number in last.items():
        dead[number].append(name)
    return tuple(map(tuple, dead))


def _dead_after(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """For each node the names that nothing after it reads."""
    return _last_uses(tuple((n.name, tuple(n.refs())) for n in graph.nodes), graph.output)
