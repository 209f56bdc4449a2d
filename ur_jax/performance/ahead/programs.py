"""What an optimised program does, read from its text: kernels, bytes, operations, collectives.

A kernel is what a device runs as one: a fusion or a call of a library, which reads its operands and
writes its result. What is inside a loop counts as often as the loop turns.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"),
    "collective-broadcast",
)
_CALLS = "body|condition|calls|to_apply|branch_computations|true_computation|false_computation"
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
# They move nothing, or what they move is counted where it began.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all iota partition-id replica-id "
    "opt-barrier domain copy-done async-done async-update add-dependency".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
# Kinds of kernels: by a part of a library call's name, by opcode, by what is fused (the first).
_LIBRARY = {"conv": "convolution", "matmul": "product", "gemm": "product", "fmha": "attention"}
_NAMED = {"dot": "product", "copy-start": "copy", "slice-start": "copy", "reduce": "reduction"}
_FUSED = {"convolution": "convolution", "dot": "product", "reduce": "reduction", "pad": "padding",
          "transpose": "transposition"}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape")


class Kernel(NamedTuple):
    """A kernel of a program.

    Attributes:
      kind: "convolution", "product", "attention", "reduction", "transposition", "padding",
        "elementwise", "copy", "collective" or the name of a library's call.
      source: the operation that it is from, by the names of the network's modules.
      result: type of its result.
      times: launches in a call of the program.
      bytes: to and from memory in one launch.
      flops: operations of its products in one launch.
    """

    kind: str
    source: str
    result: str
    times: int
    bytes: float
    flops: float


class _Instruction(NamedTuple):
    """One line of a program."""

    name: str
    type: str
    opcode: str
    arguments: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of what it takes."""
        return re.findall(r"%([\w.\-]+)", self.arguments)


_Computation = dict[str, _Instruction]


def kernels(hlo: str) -> list[Kernel]:
    """The kernels of a program's text, in its order.

    The turns of a loop are those that the compiler knows, else the one constant of its condition,
    else one. Of alternatives all count.
    """
    computations, entry = _parse(hlo)
    return list(_visit(computations, entry, 1))


def collectives(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives of a compiled program: ({name: number inside loops}, {... outside}).

    Args:
      hlo: the program as text; a loop is a `while`, and what its body or condition calls is inside.
    """
    computations, _ = _parse(hlo)
    inside = set[str]()
    for instruction in _all(computations):
        if instruction.opcode == "while":
            inside.update(_called(instruction))
    reached = set[str]()
    while inside:
        name = inside.pop()
        if name in computations and name not in reached:
            reached.add(name)
            inside.update(n for i in computations[name].values() for n in _called(i))
    inner, outer = Counter[str](), Counter[str]()
    for name, computation in computations.items():
        found = (i.opcode.removesuffix("-start") for i in computation.values())
        (inner if name in reached else outer).update(op for op in found if op in _COLLECTIVES)
    return dict(inner), dict(outer)


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """{name: computation} and the name of the first."""
    computations: dict[str, _Computation] = {}
    current, entry = None, ""
    for line in hlo.splitlines():
        if match := re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif current is not None and (match := re.match(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)):
            current[match[2]] = _instruction(match[2], match[3], bool(match[1]))
    return computations, entry


def _instruction(name: str, text: str, is_root: bool) -> _Instruction:
    """An instruction from what stands behind its name: type, opcode(operands), attributes."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    return _Instruction(name, kind, opcode, rest[len(opcode) + 1 : end], rest[end:], is_root)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _all(computations: dict[str, _Computation]) -> Iterator[_Instruction]:
    """Every instruction."""
    for computation in computations.values():
        yield from computation.values()


def _called(instruction: _Instruction) -> list[str]:
    """Names of the computations that an instruction calls."""
    lists = re.findall(rf"\b(?:{_CALLS})=(\{{[^}}]*\}}|[^,\s]+)", instruction.rest)
    return [name.strip("{}% ") for names in lists for name in names.split(",")]


def _visit(computations: dict[str, _Computation], name: str, times: int) -> Iterator[Kernel]:
    """Kernels of a computation that runs so often."""
    computation = computations.get(name, {})
    for each in computation.values():
        is_free_call = any(f'"{target}"' in each.rest for target in _FREE_CALLS)
        if each.opcode in _FREE or each.opcode.endswith("-done") or is_free_call:
            continue
        if each.opcode == "while":
            (body,) = re.findall(r"\bbody=%?([\w.\-]+)", each.rest)
            yield from _visit(computations, body, times * _turns(computations, each))
        elif each.opcode in ("call", "async-start", "conditional"):
            for called in _called(each):
                yield from _visit(computations, called, times)
        else:
            inside = _inside(computations, each)
            yield Kernel(
                kind=_kind(each, inside),
                source=_source(each, inside),
                result=each.type.split("{")[0].lstrip("("),
                times=times,
                bytes=_moved(computations, computation, each),
                flops=_flops(computation, each, inside),
            )


def _turns(computations: dict[str, _Computation], loop: _Instruction) -> int:
    """How often a loop turns."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    (condition,) = re.findall(r"\bcondition=%?([\w.\-]+)", loop.rest)
    inside = [*computations.get(condition, {}).values()]
    inside += [j for i in inside for name in _called(i) for j in computations[name].values()]
    numbers = {int(i.arguments) for i in inside if i.opcode == "constant" and "s32[]" in i.type}
    return numbers.pop() if len(numbers) == 1 else 1


def _inside(computations: dict[str, _Computation], each: _Instruction) -> list[_Computation]:
    """The computations that are fused into an instruction, at any depth."""
    found = []
    for name in _called(each) if each.opcode == "fusion" else ():
        found.append(computations[name])
        for instruction in computations[name].values():
            found += _inside(computations, instruction)
    return found


def _kind(each: _Instruction, inside: list[_Computation]) -> str:
    """What sort of kernel it is."""
    if each.opcode.removesuffix("-start") in _COLLECTIVES:
        return "collective"
    if each.opcode == "custom-call":
        target = re.findall(r'custom_call_target="([^"]*)"', each.rest)[0]
        return next((kind for part, kind in _LIBRARY.items() if part in target), target)
    if each.opcode != "fusion":
        return _NAMED.get(each.opcode, each.opcode)
    opcodes = {i.opcode for computation in inside for i in computation.values()}
    return next((kind for opcode, kind in _FUSED.items() if opcode in opcodes), "elementwise")


def _source(each: _Instruction, inside: list[_Computation]) -> str:
    """The operation that a kernel is from, by the modules that it is in."""
    lines = [each.rest, *(i.rest for c in inside for i in reversed(c.values()))]
    names = (match[1] for line in lines if (match := re.search(r'op_name="([^"]*)"', line)))
    name = next(names, each.name)
    parts = [part for part in name.split("/") if not re.search(r"[()]|^while$|^body$|^cond$", part)]
    shown = "/".join(parts[-4:]) or each.name
    return f"gradient of {shown}" if "transpose(" in name else shown


def _arrays(kind: str) -> list[tuple[str, list[int], float]]:
    """(dtype, shape, bytes in the device's main memory) of each array of a type."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(kind):
        sizes = [int(n) for n in shape.split(",") if n]
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        is_elsewhere = "S(" in layout  # a memory on the chip
        found.append((dtype, sizes, 0.0 if is_elsewhere else math.prod(sizes) * bits / 8))
    return found


def _nbytes(kind: str) -> float:
    """Bytes of a type in main memory."""
    return sum(nbytes for _, _, nbytes in _arrays(kind))


def _moved(
    computations: dict[str, _Computation], computation: _Computation, each: _Instruction
) -> float:
    """Bytes that a kernel reads and writes."""
    types = [computation[name].type for name in each.operands if name in computation]
    if each.opcode == "fusion":
        fused = computations[_called(each)[0]]
        return sum(_read(fused, number, kind) for number, kind in enumerate(types)) + _written(
            fused, each
        )
    if each.opcode in ("copy-start", "slice-start"):  # of a TPU: between its memory and the chip
        return _arrays(re.sub(r"\{[^}]*\}", "", each.type))[1][2]
    if each.opcode in _SLICES:
        return 2 * _nbytes(each.type)
    if each.opcode == "dynamic-update-slice":
        return 2 * _nbytes(types[1])
    written = [nbytes for *_, nbytes in _arrays(each.type)]
    if each.opcode == "custom-call" and len(written) > 1:
        dtype, shape, _ = _arrays(each.type)[-1]
        if dtype in ("s8", "u8") and len(shape) == 1:  # the library's workspace
            del written[-1]
    return sum(map(_nbytes, types)) + sum(written) - _skipped(each, types)


def _skipped(each: _Instruction, types: list[str]) -> float:
    """Bytes of the pixels that a library's convolution of 1x1 with a stride does not read."""
    strides = re.search(r"window=\{size=1(?:x1)* stride=([\dx]+)\}", each.rest)
    if strides is None or "conv" not in each.rest or "Backward" in each.rest:
        return 0.0
    return _nbytes(types[0]) * (1 - 1 / math.prod(int(n) for n in strides[1].split("x")))


def _read(fused: _Computation, number: int, kind: str) -> float:
    """Bytes that a fusion reads of an operand: of one that only slices are taken of, those."""
    whole = _nbytes(kind)
    names = {
        i.name for i in fused.values() if i.opcode == "parameter" and i.arguments == str(number)
    }
    total = 0.0
    for each in fused.values():  # in order: what is used comes before
        if not names.intersection(each.operands):
            continue
        if each.opcode == "bitcast":
            names.add(each.name)
        elif each.opcode in _SLICES and each.operands[0] in names:
            total += _nbytes(each.type)
        elif each.opcode == "dynamic-update-slice" and each.operands[0] in names:
            pass  # in place
        else:
            return whole
    return min(whole, total)


def _written(fused: _Computation, each: _Instruction) -> float:
    """Bytes that a fusion writes: of what is updated in place, the update."""
    updates = (i for i in fused.values() if i.opcode == "dynamic-update-slice")
    untouched = sum(_nbytes(i.type) - _nbytes(fused[i.operands[1]].type) for i in updates)
    return max(0.0, _nbytes(each.type) - untouched)


def _flops(computation: _Computation, each: _Instruction, inside: list[_Computation]) -> float:
    """Operations of the products in a kernel; multiply-adds count twice."""
    if each.opcode == "custom-call":
        return _library_flops(computation, each)
    places = [(c, i) for c in inside for i in c.values()] + [(computation, each)]
    return sum(_product_flops(*place) for place in places)


def _product_flops(computation: _Computation, each: _Instruction) -> float:
    """Operations of a dot or a convolution."""
    if each.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (_arrays(computation[name].type)[0][1] for name in each.operands[:2])
    out = math.prod(_arrays(each.type)[0][1])
    if each.opcode == "dot":
        contracted = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)[0]
        return 2.0 * out * math.prod(left[int(n)] for n in contracted.split(",") if n)
    labels = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)[0]
    dilations = re.findall(r"lhs_dilate=([\dx]+)", each.rest)
    zeros = math.prod(int(n) for n in dilations[0].split("x")) if dilations else 1
    return 2.0 * out * math.prod(right) / right[labels[1].index("o")] / zeros


def _library_flops(computation: _Computation, each: _Instruction) -> float:
    """Operations of a library's product or convolution."""
    arrays = [_arrays(computation[name].type) for name in each.operands[:2]]
    if len(arrays) < 2 or not all(arrays):
        return 0.0
    left, right = (shapes[0][1] for shapes in arrays)
    out = _arrays(each.type)[0][1]
    if found := re.search(r'"lhs_contracting_dimensions":\["([\d",]*)"\]', each.rest):
        contracted = found[1].replace('"', "").split(",")
        return 2.0 * math.prod(out) * math.prod(left[int(n)] for n in contracted)
    if labels := re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest):
        # Of a gradient by the kernel, the kernel is the result, and its second operand the images'.
        is_by_kernel = "BackwardFilter" in each.rest
        kernel, images = (out, right) if is_by_kernel else (right, left)
        if not (is_by_kernel or "BackwardInput" in each.rest):
            images = out
        features = images[(labels[1] if "BackwardInput" in each.rest else labels[3]).index("f")]
        return 2.0 * math.prod(kernel) * math.prod(images) / features
    return 0.0
