"""How a row is registered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp

from ur_jax.errors import UserError
from ur_jax.types import Array

F = TypeVar("F", bound=Callable[..., Any])

ROWS: dict[str, Callable[..., Any]] = {}
"""{name with overload: function}; every one is a row, and nothing else can be asked for."""

SCHEMAS: dict[str, str] = {}
"""{name: ATen's schema}, the reference of a row."""

LARGEST = 2**31 - 1
"""Elements of a result: more is refused before memory is taken."""


def row(*schemas: str) -> Callable[[F], F]:
    """Registers a function as the row of some schemas, "aten::add.Tensor(Tensor self, ...) -> ..."."""

    def register(function: F) -> F:
        for schema in schemas:
            name = schema.partition("(")[0].replace("::", ".")
            if name.count(".") == 1 and name.startswith("aten."):
                name += ".default"
            assert name not in ROWS, name
            ROWS[name], SCHEMAS[name] = function, schema
        return function

    return register


def dtype_of(name: str | None, otherwise: Any = jnp.float32) -> Any:
    """What JAX computes with for a dtype of PyTorch, without 64-bit numbers."""
    if name is None:
        return otherwise
    try:
        return jnp.dtype({"float64": "float32", "int64": "int32"}.get(name, name))
    except TypeError:
        raise UserError(
            f"The network's graph asks for the dtype {name!r}; convert it again."
        ) from None


def sized(*shape: int) -> tuple[int, ...]:
    """A shape, if it is one that memory should be taken for."""
    if not all(isinstance(n, int) for n in shape) or math.prod(shape) > LARGEST:
        raise UserError(
            f"The network's graph asks for an array {list(shape)}, more than {LARGEST} elements; "
            "take smaller batches or images, or convert the network again."
        )
    return shape


def axes_of(dim: Any, rank: int) -> tuple[int, ...]:
    """Axes of a reduction: one, several; none or an empty list is all."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(rank))
    return tuple(d % rank for d in (dim if isinstance(dim, (list, tuple)) else (dim,)))


def narrow(*operands: Array | None) -> list[Any]:
    """The operands of a product: in bfloat16 if one of them is."""
    given = [x for x in operands if x is not None]
    kinds = {jnp.result_type(x) for x in given}
    dtype = jnp.bfloat16 if jnp.dtype("bfloat16") in kinds else jnp.result_type(*given)
    return [None if x is None else jnp.asarray(x, dtype) for x in operands]
