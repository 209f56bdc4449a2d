"""A network as plain data: nodes that name rows of the table of operations, and nothing else.

A node names its row, and its arguments by the names of the row's schema; an argument is a value of
JSON or a reference to another node or tensor. Nothing in a graph is executed but rows of the table.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ur_jax.encoders.bridge.ops import ROWS
from ur_jax.errors import UserError, shown

VERSION = 1
"""Of the format; a file of a later one is refused."""

MAX_NODES = 200_000
DTYPES = ("float32", "int32", "bool", "uint8")
"""Of the tensors; the floating-point ones are cast to the encoder's dtype."""

STATE_DTYPES = ("float32", "bool", "uint8", "int8", "int16", "int32", "int64")
"""Of what is written back as a state dict."""

Tensors = dict[str, np.ndarray]
"""The parameters and constants of a network by name; several nodes may refer to one."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """A reference to a node, a tensor or the images, by name."""

    name: str


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
      name: of its result.
      op: a row of the table, "aten.add.Tensor".
      args: arguments by name: JSON values, lists of them, and references.
      shape: of the result, None for a size that depends on the batch; None where it is no array.
        For passes: it is not stored.
      place: the module that it is from, "blocks.0.attn"; for messages, not stored.
    """

    name: str
    op: str
    args: Mapping[str, Any]
    shape: tuple[int | None, ...] | None = None
    place: str = ""

    def refs(self) -> Iterator[str]:
        """Names that the arguments refer to, in order, with repetitions."""
        return _refs(self.args)


class Key(NamedTuple):
    """A key of the state dict that a module had.

    Attributes:
      key: the key.
      tensor: name of the graph's tensor that it is; keys of one tensor in the module share it.
      dtype: "int64" and the like; of floating point always "float32".
      is_trained: whether it is a parameter, not a buffer.
    """

    key: str
    tensor: str
    dtype: str
    is_trained: bool


@dataclasses.dataclass(frozen=True)
class Graph:
    """A function of tensors and images.

    Attributes:
      nodes: in an order in which each refers only to earlier ones.
      output: name of the result, (B,D).
      per_image: the function is of one image, (1,3,H,W), and is mapped over the batch: for modules
        that cannot be exported with a free batch size.
      input: name of the images (B,3,H,W).
      keys: of the module's state dict, for a graph whose tensors are the module's own.
    """

    nodes: tuple[Node, ...]
    output: str
    per_image: bool = False
    input: str = "%"
    keys: tuple[Key, ...] = ()

    @functools.cached_property
    def trained(self) -> frozenset[str]:
        """Names of the tensors that are parameters."""
        return frozenset(key.tensor for key in self.keys if key.is_trained)

    def replace(self, **changes: Any) -> Graph:
        """The graph with other values of some attributes."""
        return dataclasses.replace(self, **changes)


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _refs(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _refs(item)


def mapped(value: Any, fn: Callable[[Ref], Any]) -> Any:
    """A value with each reference replaced by what a function makes of it."""
    if isinstance(value, Ref):
        return fn(value)
    if isinstance(value, Mapping):
        return {name: mapped(item, fn) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mapped(item, fn) for item in value]
    return value


def dumps(graph: Graph, tensors: Mapping[str, Any]) -> str:
    """A graph as JSON text, with shape and dtype of each tensor; equal graphs give equal texts."""
    data = {
        "format": VERSION,
        "input": graph.input,
        "output": graph.output,
        "per_image": graph.per_image,
        "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()},
        "nodes": [[node.name, node.op, _encoded(node.args)] for node in graph.nodes],
    }
    if graph.keys:
        data["keys"] = [list(key) for key in graph.keys]
    return json.dumps(data, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _encoded(value: Any) -> Any:
    """A value in JSON: a reference as {"ref": name}, infinity and NaN as {"float": text}."""
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, Mapping):
        return {name: _encoded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _decoded(value: Any) -> Any:
    """The inverse of `_encoded`."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {"ref"} and isinstance(value["ref"], str):
            return Ref(value["ref"])
        if set(value) == {"float"} and value["float"] in ("inf", "-inf", "nan"):
            return float(value["float"])
        raise _bad(f"the argument {shown(value)} is no value")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str) and len(value) < 100:
        return value
    raise _bad(f"the argument {shown(value)} is no value")


@functools.lru_cache(maxsize=64)
def loads(text: str) -> tuple[Graph, Mapping[str, tuple[str, tuple[int, ...]]]]:
    """Reads a graph that `dumps` wrote, trusting nothing in it.

    Returns:
      (graph, {tensor: (dtype, shape)}).

    Raises:
      UserError: for another text, a later format, an operation that is no row of the table,
        arguments that the row does not take, or a reference to what does not come before.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(str(error)[:100]) from None
    if not isinstance(data, dict) or "format" not in data:
        raise _bad("it has no format")
    if data["format"] != VERSION:
        raise UserError(
            f"Expected a network's graph of format {VERSION}, got {shown(data['format'])}; "
            "convert the network again, or install the version of ur_jax that wrote it."
        )
    try:
        tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in data["tensors"].items()}
        rows = [(name, op, args) for name, op, args in data["nodes"]]
        keys = tuple(Key(*entry) for entry in data.get("keys", ()))
        graph = Graph((), data["output"], data["per_image"], data["input"], keys)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _bad("it lacks a field") from None
    if not all(isinstance(name, str) for name in (graph.output, graph.input)):
        raise _bad("its input or output is no name")
    for name, (dtype, shape) in tensors.items():
        if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise _bad(f"the tensor {shown(name)} is {shown(dtype)} {shown(shape)}")
    for key in graph.keys:
        is_text = all(isinstance(x, str) for x in key[:3]) and isinstance(key.is_trained, bool)
        if not is_text or key.tensor not in tensors or key.dtype not in STATE_DTYPES:
            raise _bad(f"the key {shown(key.key)} of its state dict is of no tensor")
    if len(rows) > MAX_NODES:
        raise _bad(f"it has {len(rows)} nodes, more than {MAX_NODES}")
    known, nodes = {graph.input, *tensors}, []
    for name, op, args in rows:
        nodes.append(_checked(name, op, args, known))
        known.add(name)
    if graph.output not in known:
        raise _bad(f"there is no output {shown(graph.output)}")
    return graph.replace(nodes=tuple(nodes)), tensors


def _checked(name: Any, op: Any, args: Any, known: set[str]) -> Node:
    """A node, if it names a row, arguments of that row, and what comes before it."""
    if not isinstance(name, str) or name in known:
        raise _bad(f"the node {shown(name)} is there twice, or has no name")
    if not isinstance(op, str) or op not in ROWS:
        raise UserError(
            f"The network's graph asks for {shown(op)}, which is no operation of the table; "
            "convert the network again with this version of ur_jax."
        )
    if not isinstance(args, dict) or not set(args) <= set(inspect.signature(ROWS[op]).parameters):
        raise _bad(f"the arguments of node {shown(name)} are not those of {op}")
    node = Node(name, op, {key: _decoded(value) for key, value in args.items()})
    if missing := [ref for ref in node.refs() if ref not in known]:
        raise _bad(f"node {shown(name)} refers to {shown(missing[0])}, which is not before it")
    return node


def _bad(why: str) -> UserError:
    return UserError(
        f"The network's graph cannot be read: {why}. Convert the network, or fetch the file, again."
    )


class Names:
    """Names for new nodes and tensors, apart from those that are taken."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Any]):
        self._taken = {graph.input, *tensors, *(node.name for node in graph.nodes)}

    def new(self, wanted: str) -> str:
        """The wanted name, or the next free one after it."""
        stem = re.sub(r"~\d+$", "", wanted)
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{stem}~{number}"
        self._taken.add(name)
        return name


def uses(graph: Graph) -> dict[str, list[Node]]:
    """{name: the nodes that refer to it}, each once."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in dict.fromkeys(node.refs()):
            found.setdefault(name, []).append(node)
    return found


def without_unused(graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """Removes nodes and tensors that the output does not need."""
    needed, kept = {graph.output}, []
    for node in reversed(graph.nodes):
        if node.name in needed:
            kept.append(node)
            needed.update(node.refs())
    used = {name: tensor for name, tensor in tensors.items() if name in needed}
    return graph.replace(nodes=tuple(reversed(kept))), used


def cast_dtype(name: str) -> Any:
    """What JAX computes with for a dtype of PyTorch, without 64-bit numbers."""
    return jnp.dtype({"float64": "float32", "int64": "int32"}.get(name, name))
