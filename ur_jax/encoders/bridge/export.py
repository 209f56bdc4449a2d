"""From a PyTorch module to a graph: `torch.export` with a free batch size.

What depends on parameters alone, such as interpolated positions and rotary tables, PyTorch
computes here, once. Attention, linear layers and normalisations are kept whole. Everything that is
refused is said in one error.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ur_jax.encoders.bridge.graph import Graph, Node, Ref, Tensors
from ur_jax.encoders.bridge.ops import ROWS
from ur_jax.errors import UserError, require

WHOLE = (
    *("linear", "matmul", "layer_norm", "group_norm", "rms_norm", "scaled_dot_product_attention"),
    *("silu", "mish", "hardswish", "hardsigmoid", "softplus", "type_as", "softmax.int"),
    *("roll", "stack", "pixel_shuffle", "pixel_unshuffle", "max_pool2d", "avg_pool2d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool1d", "to.dtype", "to.dtype_layout", "im2col"),
    *("upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "upsample_nearest2d.vec"),
    *("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec", "chunk", "unbind.int"),
    *("split.Tensor", "split_with_sizes", "index_select", "masked_fill.Scalar", "col2im"),
)
"""Operations of ATen that are not taken apart."""

_CAST = "aten.to.dtype"
_NO_NUMBERS = ("layout", "device", "pin_memory", "memory_format", "non_blocking", "generator")
_DROPPED = ("_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "_assert_async")
_OPERATORS = {
    **{operator.add: "add", operator.sub: "sub", operator.mul: "mul"},
    **{operator.floordiv: "floordiv", operator.mod: "mod", operator.neg: "neg"},
}
_DATA_DEPENDENT = "data.dependent|GuardOnDataDependent|unbacked|Could not guard|nonzero"
_FOLDED = 4, 2**22
"""A constant of more elements is kept as its formula where it is so much larger than its inputs."""


class Exported(NamedTuple):
    """A graph of an NCHW module whose input is (B,H,W,3), and its tensors."""

    graph: Graph
    tensors: Tensors


def export(module: Any, input_size: tuple[int, int], name: str, *, fold: bool = True) -> Exported:
    """Exports a module that maps (B,3,H,W) to (B,D), in inference mode.

    Args:
      module: a `torch.nn.Module` whose parameters need no gradient.
      input_size: (H, W).
      name: of the encoder, for errors.
      fold: compute what depends on parameters alone, too; without, the graph does it.

    Raises:
      UserError: for operations that are no rows of the table, all in one error with their places;
        for control flow or shapes that depend on data; for a module that cannot be exported.
    """
    program, per_image = _program(module, input_size, name)
    nodes, tensors = _Converter(program, name, fold).convert()
    output = nodes.pop().args["output"].name
    graph = Graph(tuple(nodes), output, per_image)
    return Exported(graph, tensors)


def _program(module: Any, input_size: tuple[int, int], name: str) -> tuple[Any, bool]:
    """The exported program, with a free batch size, or of one image where that cannot be."""
    torch = require("torch", "torch", "Exporting a PyTorch module")
    batch = torch.export.Dim("batch", min=2, max=4096)
    images = torch.zeros(3, 3, *input_size)
    with _inference(torch):
        try:
            program = torch.export.export(
                module, (images,), dynamic_shapes=({0: batch},), strict=False
            )
            per_image = False
        except Exception:  # a module may hold the batch size fast
            try:
                program = torch.export.export(module, (images[:1],), strict=False)
                per_image = True
            except Exception as error:  # torch has no common class for it
                raise _refused(error, name) from error
        _keep_casts(torch, program)
        table = torch.export.default_decompositions()
        for operation in WHOLE:
            packet, _, overload = operation.partition(".")
            table.pop(getattr(getattr(torch.ops.aten, packet), overload or "default"), None)
        try:
            return program.run_decompositions(table), per_image
        except Exception as error:
            raise _refused(error, name) from error


_kept: list[Any] = []  # a library's definitions end with it


def _keep_casts(torch: Any, program: Any) -> None:
    """Has casts to float32 stay, which change nothing in float32, but do in bfloat16."""
    if not _kept:
        library = torch.library.Library("ur_jax", "DEF")
        library.define("to_float32(Tensor x) -> Tensor")
        library.impl("to_float32", lambda x: x.clone(), "CompositeExplicitAutograd")
        _kept.append(library)
    for part in program.graph_module.modules():
        for node in getattr(getattr(part, "graph", None), "nodes", ()):
            is_cast = node.target is torch.ops.aten.to.dtype
            if is_cast and node.args[1:] == (torch.float32,) and not node.kwargs:
                node.target, node.args = torch.ops.ur_jax.to_float32.default, node.args[:1]


@contextlib.contextmanager
def _inference(torch: Any) -> Iterator[None]:
    """No gradients, and no fused kernels of PyTorch's own."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _quiet():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export writes about itself."""
    import logging
    import warnings

    loggers = [logging.getLogger(n) for n in ("torch.fx", "torch.export", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _refused(error: Exception, name: str) -> UserError:
    """The error for a module that torch.export does not take."""
    text = str(error)
    at = _own_line(error)
    if re.search(_DATA_DEPENDENT, text, re.IGNORECASE):
        return UserError(
            f"The network {name!r} decides by the values of its data{at}: control flow or shapes "
            "that depend on data cannot be exported; write it with torch.where, or masks."
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return UserError(
        f"The network {name!r} cannot be exported{at}: {type(error).__name__}: {first[:300]} See "
        "torch.export's documentation of what it takes."
    )


def _own_line(error: Exception) -> str:
    """Where in the user's code it happened, " (file.py:12)"; the last line outside of torch."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "ur_jax/encoders" not in f.filename]
    return f" ({own[-1].filename.rpartition('/')[2]}:{own[-1].lineno})" if own else ""


class _Converter:
    """The nodes and tensors of an exported program, as plain data."""

    def __init__(self, program: Any, name: str, fold: bool):
        import torch

        self._torch, self._program, self._name = torch, program, name
        self._constants: dict[str, Any] = {}  # {fx name: tensor or value that depends on no image}
        self._parameters: dict[str, str] = {}  # {fx name: name of the tensor}
        self._fold = fold
        self._trained: set[str] = set()  # fx names that are parameters
        self._refs: dict[str, Any] = {}
        self._tensors: Tensors = {}
        self._by_storage: dict[Any, str] = {}
        self._nodes: list[Node] = []
        self._unsupported: Counter[str] = Counter()
        self._places: dict[str, str] = {}

    def convert(self) -> tuple[list[Node], Tensors]:
        """Returns (nodes, the last of which names the output; tensors)."""
        torch = self._torch
        fx = self._program.graph_module.graph
        self._placeholders()
        images = next(s.arg.name for s in self._inputs() if s.kind.name == "USER_INPUT")
        placeholder = next(n for n in fx.nodes if n.name == images)
        shape = (None, *(self._meta_shape(placeholder) or ())[1:])
        self._nodes.append(
            Node("images/nchw", "aten.permute.default",
                 {"self": Ref("%"), "dims": [0, 3, 1, 2]}, shape)
        )  # fmt: skip
        self._refs[images] = Ref("images/nchw")
        with torch.no_grad():
            for node in fx.nodes:
                if node.op == "call_function":
                    self._call(node)
                elif node.op == "output":
                    self._output(node)
        if self._unsupported:
            listed = ", ".join(
                f"{op} ({count} times, first in {self._places[op] or 'the module'})"
                for op, count in sorted(self._unsupported.items())
            )
            raise UserError(
                f"The network {self._name!r} uses operations that are not in the table: {listed}. "
                "Write these parts otherwise, or add rows to ur_jax.encoders.bridge.ops."
            )
        return self._nodes, self._tensors

    def _inputs(self) -> list[Any]:
        return self._program.graph_signature.input_specs

    def _placeholders(self) -> None:
        """Parameters, buffers and constants of the module."""
        have = {**self._program.state_dict, **self._program.constants}
        for spec in self._inputs():
            if spec.kind.name == "USER_INPUT":
                continue
            tensor = have[spec.target]
            self._constants[spec.arg.name] = tensor
            self._parameters[spec.arg.name] = spec.target.removeprefix("module.")
            if spec.kind.name == "PARAMETER" and not self._fold:
                self._trained.add(spec.arg.name)

    def _call(self, node: Any) -> None:
        """One call: computed if it depends on no image, otherwise a node."""
        op = self._op_name(node)
        if any(op.startswith(f"aten.{dropped}") for dropped in _DROPPED):
            return
        inputs = node.all_input_nodes
        is_free = all(n.name in self._constants and n.name not in self._trained for n in inputs)
        if is_free and self._is_computable(node):
            try:
                self._constants[node.name] = self._computed(node)
                return
            except Exception:  # it stays a node
                pass
        if op not in ROWS:
            self._unsupported[op] += 1
            self._places.setdefault(op, _place(node))
            self._refs[node.name] = Ref(f"%{node.name}")
            return
        args = {key: self._value(value) for key, value in self._arguments(node, op).items()}
        name = f"%{node.name}"  # a tensor may be called "mean", too
        self._nodes.append(Node(name, op, args, self._meta_shape(node), _place(node)))
        self._refs[node.name] = Ref(name)

    def _op_name(self, node: Any) -> str:
        """The name of a row, or what would be one."""
        if node.target is operator.getitem:
            return "ur.getitem"
        if node.target in _OPERATORS:
            return f"ur.size_{_OPERATORS[node.target]}"
        return _CAST if str(node.target) == "ur_jax.to_float32.default" else str(node.target)

    def _is_computable(self, node: Any) -> bool:
        """Whether it is no chance, and not much larger than what it is made of."""
        tags = getattr(node.target, "tags", ())
        if self._torch.Tag.nondeterministic_seeded in tags and not node.all_input_nodes:
            return False
        value = node.meta.get("val")
        if not isinstance(value, self._torch.Tensor):
            return True
        if not all(isinstance(n, int) for n in value.shape):
            return False
        sizes = [
            getattr(self._constants.get(n.name), "numel", lambda: 0)() for n in node.all_input_nodes
        ]
        times, least = _FOLDED
        return value.numel() <= least or value.numel() <= times * sum(sizes)

    def _computed(self, node: Any) -> Any:
        """What PyTorch makes of constants."""
        get = lambda n: self._constants[n.name]
        args = self._torch.fx.map_arg(node.args, get)
        kwargs = self._torch.fx.map_arg(node.kwargs, get)
        return node.target(*args, **kwargs)

    def _arguments(self, node: Any, op: str) -> dict[str, Any]:
        """Arguments by the names of the schema, without those that change no number."""
        if op == "ur.getitem":
            return {"items": node.args[0], "index": node.args[1]}
        if op.startswith("ur.size_"):
            return dict(zip("ab", node.args))
        if str(node.target).startswith("ur_jax."):
            return {"self": node.args[0], "dtype": "float32"}
        names = [a.name for a in node.target._schema.arguments]
        given = {**dict(zip(names, node.args)), **node.kwargs}
        defaults = {a.name: a.default_value for a in node.target._schema.arguments}
        required = {a.name for a in node.target._schema.arguments if not a.has_default_value()}
        return {
            key: value
            for key, value in given.items()
            if key not in _NO_NUMBERS and (key in required or not _is_same(value, defaults[key]))
        }

    def _value(self, value: Any) -> Any:
        """An argument as plain data; a constant becomes a tensor of the graph, or a number."""
        torch = self._torch
        if isinstance(value, torch.fx.Node):
            if value.name in self._constants:
                return self._constant(value.name)
            return self._refs[value.name]
        if isinstance(value, (list, tuple)):
            return [self._value(item) for item in value]
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise UserError(
            f"The network {self._name!r} has an argument {value!r:.60} that is no plain data; "
            "write that part otherwise."
        )

    def _constant(self, name: str) -> Any:
        """A constant that a node reads."""
        if name in self._refs:
            return self._refs[name]
        value = self._constants[name]
        if not isinstance(value, self._torch.Tensor):
            return value
        is_parameter = name in self._parameters
        if value.dim() == 0 and not is_parameter:
            number = value.item()
            if value.dtype != self._torch.bool:
                return number
        wanted = self._parameters.get(name, f"constant/{name}")
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if key not in self._by_storage or value.numel() == 0:
            self._by_storage[key] = wanted
            self._tensors[wanted] = as_array(value, is_parameter)
        self._refs[name] = Ref(self._by_storage[key])
        return self._refs[name]

    def _output(self, node: Any) -> None:
        """The one output; a module may give constants or several, which `source` has looked at."""
        specs = self._program.graph_signature.output_specs
        wanted = next(
            value
            for value, spec in zip(node.args[0], specs, strict=True)
            if spec.kind.name == "USER_OUTPUT"
        )
        self._nodes.append(Node("output", "", {"output": self._value(wanted)}))

    def _meta_shape(self, node: Any) -> tuple[int | None, ...] | None:
        value = node.meta.get("val")
        if not isinstance(value, self._torch.Tensor):
            return None
        return tuple(n if isinstance(n, int) else None for n in value.shape)


def as_array(tensor: Any, is_parameter: bool) -> np.ndarray:
    """A tensor as a NumPy array without 64-bit numbers."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        array = np.array(tensor.to(torch.float32).numpy())
        if not is_parameter:  # masks: a number that bfloat16 has, too
            array = np.clip(array, -1e38, 1e38)
        return array
    if tensor.dtype in (torch.bool, torch.uint8):
        return np.array(tensor.numpy())
    return np.clip(tensor.numpy(), -(2**31), 2**31 - 1).astype(np.int32)


def _is_same(value: Any, default: Any) -> bool:
    """Whether an argument is its default; a node never is."""
    plain = (type(None), bool, int, float, str, list, tuple)
    return isinstance(value, plain) and type(value) is type(default) and value == default


def _place(node: Any) -> str:
    """The module that a node is from, "blocks.0.attn"."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    names = [entry[0] for entry in stack.values()]
    return re.sub(r"^(L\['self'\]\.?)?(module\.)?", "", names[-1]) if names else ""
