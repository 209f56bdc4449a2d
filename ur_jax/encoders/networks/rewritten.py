"""A user's own convolutions in an attack's loop, with gradients that CPUs have fast kernels for.

XLA's CPU compiler brings convolutions into the form of its fast kernels outside of loops only. A
convolution's gradient by its input stays slow inside an attack's loop, and a grouped one is slow
everywhere. So the convolutions of a traced function are replaced by those of
`bridge.ops.convolution`, whose gradients are written out; on accelerators these are JAX's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from ur_jax.types import Array


def with_fast_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, whose reverse mode is fast on CPUs inside loops.

    Its values are the same bit for bit, but for grouped convolutions on CPUs, where they and all
    gradients agree up to rounding. A function without such convolutions is called as it is. It has
    no forward mode.
    """

    @functools.wraps(fn)
    def called(*arguments):
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*arguments)
        if not any(_is_slow(equation) for equation in _equations(closed.jaxpr)):
            return fn(*arguments)
        outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return called


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Equations of a jaxpr and of the jitted functions that it calls."""
    for equation in jaxpr.eqns:
        inner = _jitted(equation)
        yield from [equation] if inner is None else _equations(inner.jaxpr)


def _jitted(equation: Any) -> Any:
    """The closed jaxpr of a call of a jitted function; None for another equation."""
    return equation.params["jaxpr"] if equation.primitive.name in ("jit", "pjit") else None


def _is_slow(equation: Any) -> bool:
    """Whether an equation is a convolution that is replaced."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    params, (x, kernel) = equation.params, (variable.aval for variable in equation.invars)
    return (
        x.ndim == 4
        and x.dtype == kernel.dtype == equation.outvars[0].aval.dtype
        and set(params["lhs_dilation"]) == {1}
        and params["batch_group_count"] == 1
        and _is_default(params["precision"])
    )


def _is_default(precision: Any) -> bool:
    """Whether a precision is what a convolution has that asks for none."""
    name = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    known = name in ("default", "high", "highest")
    return precision is None or (known and precision == (jax.lax.Precision(name),) * 2)


def _evaluate(jaxpr: Any, consts: Any, arguments: list[Any]) -> list[Any]:
    """Evaluates a jaxpr with its convolutions replaced."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    value = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
    for equation in jaxpr.eqns:
        inputs = [value(atom) for atom in equation.invars]
        inner = _jitted(equation)
        if inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        elif _is_slow(equation):
            outputs = [_convolution(*inputs, equation.params)]
        else:
            bound = equation.primitive.get_bind_params(equation.params)
            # Some versions of jax keep functions beside the parameters, some among them.
            functions, params = bound if isinstance(bound, tuple) else ((), bound)
            with equation.ctx.manager:
                found = equation.primitive.bind(*functions, *inputs, **params)
            outputs = found if equation.primitive.multiple_results else [found]
        values |= zip(equation.outvars, outputs, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _convolution(x: Array, kernel: Array, params: dict[str, Any]) -> Array:
    """The convolution of an equation, in the layout of the fast kernels."""
    from ur_jax.encoders.bridge.ops import convolution  # the bridge is made of networks' layers

    (batch, channel, *places), (out, into, *sizes), result = params["dimension_numbers"]
    (high, wide), (top, left) = params["window_strides"], params["rhs_dilation"]
    x, kernel = x.transpose(batch, *places, channel), kernel.transpose(*sizes, into, out)
    pads, groups = params["padding"], params["feature_group_count"]
    y = convolution.convolved(x, kernel, (high, wide), tuple(pads), (top, left), groups)
    return y.transpose(*np.argsort((result[0], *result[2:], result[1])))
