"""Convolutions in (B,H,W,C), with no transposition between layers.

Of every image-like value there may be two versions: the module's, channels second, and one with
channels last. A convolution makes the second; what follows takes it as long as it can, and a
transposition is put in only where something else is needed. Kernels become HWIO here, once; those
of an encoder that is to be trained as part of the function, so that their tensors stay PyTorch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from ur_jax.encoders.bridge.graph import Graph, Names, Node, Ref, Tensors, without_unused
from ur_jax.encoders.bridge.passes.simplify import PERMUTE

_UNARY = """abs ceil clamp clamp_max clamp_min cos elu erf exp expm1 floor gelu hardsigmoid
    hardswish hardtanh leaky_relu log log1p logical_not mish neg reciprocal relu relu6 rsqrt sigmoid
    sign silu sin softplus sqrt square tan tanh trunc _to_copy to clone contiguous alias detach
    """.split()
_BINARY = """add sub rsub mul div maximum minimum pow where eq ne lt le gt ge logical_and logical_or
    """.split()
_REDUCTIONS = "mean sum amax amin var linalg_vector_norm".split()
_POOLS = "max_pool2d avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d".split()


_PER_CHANNEL = ("ur.affine", "ur.batch_norm")
"""Of their arguments "self" alone is no tensor of channels."""


def channels_last(
    graph: Graph, tensors: Tensors, trained: Collection[str] = ()
) -> tuple[Graph, Tensors]:
    """Gives every 2-D convolution channels last.

    Args:
      graph, tensors: the network.
      trained: names of tensors that are not replaced by others: the graph turns them.
    """
    return _Rewriter(graph, dict(tensors), trained).run()


def _last(rank: int) -> list[int]:
    """The permutation that brings channels from second to last."""
    return [0, *range(2, rank), 1]


def _second(rank: int) -> list[int]:
    """Its inverse."""
    return [0, rank - 1, *range(1, rank - 1)]


class _Rewriter:
    def __init__(self, graph: Graph, tensors: Tensors, trained: Collection[str]):
        self.graph, self.tensors, self.trained = graph, tensors, trained
        self.names = Names(graph, tensors)
        self.shapes: dict[str, Any] = {name: t.shape for name, t in tensors.items()}
        self.nodes: list[Node] = []
        self.last: dict[str, str] = {}  # {name: of its version with channels last}
        self.missing: set[str] = set()  # of those, names whose own version is not made yet
        self.dims: dict[str, tuple[str, list[int]]] = {}  # {name: what it is a permutation of}

    def run(self) -> tuple[Graph, Tensors]:
        for node in self.graph.nodes:
            self.shapes[node.name] = node.shape
            if not self._moved(node):
                self._kept(node)
        self._need(self.graph.output)
        graph = self.graph.replace(nodes=tuple(self.nodes))
        return without_unused(graph, self.tensors)

    def _add(self, node: Node) -> None:
        self.nodes.append(node)
        self.shapes[node.name] = node.shape

    def _kept(self, node: Node) -> None:
        """A node as it is; versions that it needs are made."""
        for name in node.refs():
            self._need(name)
        if node.op == PERMUTE:
            self.dims[node.name] = (node.args["self"].name, list(node.args["dims"]))
        self._add(node)

    def _need(self, name: str) -> None:
        """Makes the module's own version of a value, if only the other is there."""
        if name in self.missing:
            self.missing.remove(name)
            shape = self.shapes[name]
            args = {"self": Ref(self.last[name]), "dims": _second(len(shape))}
            self._add(Node(name, PERMUTE, args, shape))

    def _version(self, value: Any, rank: int) -> Any:
        """An argument with channels last, for an operation of this rank that broadcasts."""
        if not isinstance(value, Ref):
            return value
        name, shape = value.name, self.shapes.get(value.name)
        if shape is None or not shape:
            return value
        if name in self.last:
            return Ref(self.last[name])
        if name in self.tensors:
            return self._constant(name, rank)
        if len(shape) < rank:
            return None
        source, dims = self.dims.get(name, (name, list(range(rank))))
        made = self.names.new(f"{name}/last")
        args = {"self": Ref(source), "dims": [dims[d] for d in _last(rank)]}
        self._add(Node(made, PERMUTE, args, tuple(shape[d] for d in _last(rank))))
        self.last[name] = made
        return Ref(made)

    def _constant(self, name: str, rank: int) -> Ref:
        """A tensor that is broadcast, with channels last."""
        made = f"{name}/last{rank}"
        if name in self.trained:
            if made not in self.shapes:
                shape = (1,) * (rank - len(self.shapes[name])) + tuple(self.shapes[name])
                view = self.names.new(f"{made}/view")
                viewed = {"self": Ref(name), "size": list(shape)}
                self._add(Node(view, "aten.view.default", viewed, shape))
                turned = tuple(shape[d] for d in _last(rank))
                args = {"self": Ref(view), "dims": _last(rank)}
                self._add(Node(made, PERMUTE, args, turned))
            return Ref(made)
        if made not in self.tensors:
            tensor = self.tensors[name]
            tensor = tensor.reshape((1,) * (rank - tensor.ndim) + tensor.shape)
            self.tensors[made] = np.ascontiguousarray(tensor.transpose(_last(rank)))
            self.shapes[made] = self.tensors[made].shape
        return Ref(made)

    def _is_last(self, value: Any) -> bool:
        return isinstance(value, Ref) and value.name in self.last

    def _result(self, node: Node, op: str, args: dict[str, Any]) -> bool:
        """The node with channels last, as the version of its result."""
        shape = node.shape
        assert shape is not None
        name = self.names.new(f"{node.name}/last")
        moved = tuple(shape[d] for d in _last(len(shape)))
        self._add(dataclasses.replace(node, name=name, op=op, args=args, shape=moved))
        self.last[node.name] = name
        self.missing.add(node.name)
        return True

    def _moved(self, node: Node) -> bool:
        """Whether the node could be made with channels last."""
        if node.op == "aten.convolution.default":
            return self._convolution(node)
        if node.op == PERMUTE:
            return self._permutation(node)
        name = node.op.split(".")[1]
        inputs = [x for x in _top_refs(node)]
        if not any(self._is_last(x) for x in inputs) or node.shape is None:
            return False
        rank = len(node.shape)
        if (
            name in _UNARY
            and isinstance(node.args["self"], Ref)
            and self._is_last(node.args["self"])
        ):
            args = {**node.args, "self": Ref(self.last[node.args["self"].name])}
            return self._result(node, node.op, args)
        if name in _BINARY or name == "cat" or node.op in _PER_CHANNEL:
            return self._broadcast(node, name, rank)
        source = node.args.get("self")
        if not self._is_last(source):
            return False
        assert isinstance(source, Ref)
        if name in _POOLS and rank == 4:
            op = f"ur.{name.removeprefix('_')}"
            return self._result(node, op, {**node.args, "self": Ref(self.last[source.name])})
        if name in _REDUCTIONS or node.op == "ur.normalize":
            return self._reduction(node, source)
        if name in ("view", "reshape", "_unsafe_view"):
            return self._flattened(node, source)
        if name == "slice":
            dim = node.args.get("dim", 0) % rank
            args = {**node.args, "self": Ref(self.last[source.name]), "dim": _last(rank).index(dim)}
            return self._result(node, node.op, args)
        if name == "constant_pad_nd" and len(node.args["pad"]) == 4 and rank == 4:
            pad = [0, 0, *node.args["pad"]]
            return self._result(
                node, node.op, {**node.args, "self": Ref(self.last[source.name]), "pad": pad}
            )
        return False

    def _convolution(self, node: Node) -> bool:
        """A convolution of two axes whose kernel is a tensor of the graph."""
        weight, args = node.args["weight"], node.args
        held = isinstance(weight, Ref) and weight.name in self.tensors
        if not held or args["transposed"] or self.tensors[weight.name].ndim != 4:
            return False
        if any(v < 0 for v in args["padding"]) or node.shape is None:
            return False
        kernel = f"{weight.name}/hwio"
        if weight.name in self.trained:
            if kernel not in self.shapes:
                turned = {"self": weight, "dims": [2, 3, 1, 0]}
                shape = self.shapes[weight.name]
                self._add(Node(kernel, PERMUTE, turned, tuple(shape[d] for d in (2, 3, 1, 0))))
        elif kernel not in self.tensors:
            turned = np.ascontiguousarray(self.tensors[weight.name].transpose(2, 3, 1, 0))
            self.tensors[kernel] = turned
        two = lambda x: [*x] * (2 // len(x))
        return self._result(
            node,
            "ur.conv2d",
            {
                "input": self._version(args["input"], 4),
                "kernel": Ref(kernel),
                "bias": args.get("bias"),
                "stride": two(args["stride"]),
                "padding": two(args["padding"]),
                "dilation": two(args["dilation"]),
                "groups": args["groups"],
            },
        )

    def _permutation(self, node: Node) -> bool:
        """A permutation of a value whose other version is there: of that one."""
        source = node.args["self"]
        if not self._is_last(source) or source.name not in self.missing:
            return False
        back = _second(len(node.args["dims"]))
        dims = [back[d] for d in node.args["dims"]]
        self._add(
            dataclasses.replace(node, args={"self": Ref(self.last[source.name]), "dims": dims})
        )
        self.dims[node.name] = (self.last[source.name], dims)
        return True

    def _broadcast(self, node: Node, name: str, rank: int) -> bool:
        """An operation element by element of several values, or their joining."""
        if rank < 3:
            return False
        versions: dict[str, Any] = {}

        def version(value):
            if isinstance(value, Ref) and len(self.shapes.get(value.name) or ()) > rank:
                return None
            return self._version(value, rank)

        for key, value in node.args.items():
            if isinstance(value, Ref) and not (node.op in _PER_CHANNEL and key != "self"):
                versions[key] = version(value)
            elif isinstance(items := value, list) and key == "tensors":
                versions[key] = [version(x) for x in items]
            else:
                versions[key] = value
                continue
            if versions[key] is None or None in np.atleast_1d(versions[key]).tolist():
                return False
        if name == "cat":
            versions["dim"] = _last(rank).index(node.args.get("dim", 0) % rank)
        if node.op in _PER_CHANNEL:
            versions["axis"] = rank - 1
        return self._result(node, node.op, versions)

    def _reduction(self, node: Node, source: Ref) -> bool:
        """A reduction over axes: renumbered; one that drops axes may give the same either way."""
        rank = len(self.shapes[source.name])
        dim = node.args.get("dim")
        if dim is None or dim == []:
            return False
        axes = [d % rank for d in (dim if isinstance(dim, list) else [dim])]
        moved = [_last(rank).index(d) for d in axes]
        args = {**node.args, "self": Ref(self.last[source.name]), "dim": moved}
        if node.args.get("keepdim") or node.op == "ur.normalize":
            return self._result(node, node.op, args)
        left = [d for d in _last(rank) if d not in axes]
        if left != sorted(left):
            return False
        self._add(dataclasses.replace(node, args=args))
        return True

    def _flattened(self, node: Node, source: Ref) -> bool:
        """(B,C,H,W) to (B,C,HW): with channels last (B,HW,C); (B,C,1,1) to (B,C) is either way."""
        before: tuple[Any, ...] = self.shapes[source.name]
        after: tuple[Any, ...] = node.shape or ()
        size = node.args.get("size", node.args.get("shape"))
        if len(after) == 2:
            if before[2:] != (1, 1) or after[0] != before[0]:
                return False
            args = {**node.args, "self": Ref(self.last[source.name])}
            self._add(dataclasses.replace(node, args=args))
            return True
        is_flat = (
            len(before) == 4 and len(after) == 3 and before[1] == after[1] and before[0] == after[0]
            and None not in before[1:]
        )  # fmt: skip
        if not is_flat:
            return False
        key = "size" if "size" in node.args else "shape"
        args = {"self": Ref(self.last[source.name]), key: [size[0], *reversed(after[1:])]}
        return self._result(node, node.op, args)


def _top_refs(node: Node) -> Iterator[Ref]:
    """References among the arguments that are values themselves, or lists of them."""
    for value in node.args.values():
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, list):
            yield from [x for x in value if isinstance(x, Ref)]
