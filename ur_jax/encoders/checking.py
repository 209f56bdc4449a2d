"""An encoder doubted before it is used: `Encoder.check`, and NaN that XLA's CPU programs lose.

A maximum of NaN and a number is NaN, in JAX's words and in IEEE 754's; XLA's CPU programs give the
number where they fuse it, so that a ReLU or a max-pool turns a broken picture into a perfect one.
`keeping_nan` is the same function with every maximum and minimum written so that none is lost. It
costs one more forward pass, and compiling it: it is for a batch now and then, not for each step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, primitives

from ur_jax.encoders.base import Encoder, check_images
from ur_jax.errors import UserError
from ur_jax.types import Array

_NUM_CHECKED = 4
_SAME = {"float32": 1e-3, "bfloat16": 5e-2}  # of the norm: rounding stays below it
_COLLAPSED = 1e-5  # of the norm: distances between images below it are rounding
_FLAT, _RISES = 0.02, 10.0

# Reductions that lose NaN, and the one that finds it in a mask of 0 and 1.
_REDUCTIONS = {
    "reduce_max": primitives.reduce_max_p,
    "reduce_min": primitives.reduce_max_p,
    "reduce_window_max": primitives.reduce_window_max_p,
    "reduce_window_min": primitives.reduce_window_max_p,
    "cummax": primitives.cummax_p,
    "cummin": primitives.cummax_p,
}
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""Parameters that hold what a call calls."""
_CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
)


def check(encoder: Encoder, images: Array | np.ndarray) -> tuple[str, ...]:
    """Doubts an encoder, on a few images.

    Args:
      encoder: the encoder.
      images: (B,H,W,3) float32 in [0,1], of different content; the first four are looked at.

    Returns:
      What a user should know though it stops nothing, a sentence each: images whose representation
      is not finite, or whose gradient is zero or not finite; pixels on another scale than the
      network seems to expect.

    Raises:
      UserError: if a representation depends on the other images of its batch, on its place there
        or on chance; if none is finite, or NaN arises inside the network for all; if all are the
        same.
    """
    check_images(encoder, images)
    images = jnp.asarray(images, jnp.float32)[:_NUM_CHECKED]
    if len(images) == 1:
        images = jnp.concatenate([images, 1.0 - images])
    represent = lambda x: np.asarray(_represent(encoder, x), np.float64)
    first = represent(images)
    name = f"encoder {encoder.name!r}"
    finite = np.isfinite(first).all(1)
    whole = finite & np.asarray(finite_inside(encoder, images))
    if not finite.any():
        raise UserError(f"The representations of {name} are not finite; {_BROKEN}")
    if not whole.any():
        raise UserError(
            f"NaN arises inside {name}, and a maximum or minimum after it hides that; {_BROKEN}"
        )
    found = []
    if not whole.all():
        found.append(
            f"NaN or infinity arises inside {name} for {np.sum(~whole)} of {len(whole)} images; it "
            f"shows in the representations of {np.sum(~finite)}. Then {_BROKEN}"
        )
    images, first = images[np.flatnonzero(whole)], first[whole]
    same = _SAME[encoder.dtype] * max(np.linalg.norm(first, axis=1).max(), 1e-30)
    apart = lambda a, b: np.linalg.norm(a - b, axis=-1).max()
    if apart(first, represent(images)) > same:
        raise UserError(f"Two calls of {name} differ: chance is at work. {_INFERENCE}")
    repeated = represent(jnp.broadcast_to(images[:1], images.shape))
    if apart(repeated, repeated[:1]) > same:
        raise UserError(
            f"The same image has other representations at other places of a batch of {name}: "
            f"chance is at work. {_INFERENCE}"
        )
    if apart(repeated[:1], first[:1]) > same:
        raise UserError(
            f"A representation of {name} depends on the other images of its batch. {_INFERENCE}"
        )
    if len(first) > 1 and _spread(first) <= _COLLAPSED:
        raise UserError(
            f"The representations of {name} are collapsed: the same for all images; look at its "
            "training, and at the scale of the pixels that it expects (mean, std)."
        )
    return (*found, *_remarks(encoder, images, first))


_INFERENCE = "Put the network in inference mode (BatchNorm and Dropout), as `from_nnx` does."
_BROKEN = "look at its weights, and for divisions by zero and overflow."


def _remarks(encoder: Encoder, images: Array, representations: np.ndarray):
    """Yields what is worth knowing of an encoder that works."""
    gradient = np.asarray(_gradient(encoder, images)).reshape(len(images), -1)
    if broken := int((~np.isfinite(gradient)).any(1).sum()):
        yield (
            f"The gradient of encoder {encoder.name!r} is not finite for {broken} of {len(images)} "
            "images; attacks count such entries as zero."
        )
    if flat := int((gradient == 0).all(1).sum()):
        yield (
            f"The gradient of encoder {encoder.name!r} is zero for {flat} of {len(images)} images: "
            "attacks stay at their random start, which says nothing of its robustness. Look for "
            "rounding, integer pixels and stop_gradient."
        )
    scaled = np.asarray(_represent(encoder, 255 * images), np.float64)
    spread = _spread(representations)
    if spread < _FLAT and np.isfinite(scaled).all() and _spread(scaled) > _RISES * spread:
        yield (
            f"Representations of encoder {encoder.name!r} differ by {spread:.2g} of their norm, by "
            f"{_spread(scaled):.2g} for pixels times 255: if the network expects 0 to 255, give "
            "std=(1/255,) * 3."
        )


def _spread(representations: np.ndarray) -> float:
    """Largest distance of representations to the first one, as a share of the largest norm."""
    distances = np.linalg.norm(representations - representations[:1], axis=1)
    return float(distances.max() / max(np.linalg.norm(representations, axis=1).max(), 1e-30))


def finite_inside(encoder: Encoder, images: Array) -> Array:
    """Whether the representation of each image (B,) is finite with no NaN lost on the way.

    Args:
      encoder: the encoder.
      images: (B,H,W,3) float32.
    """
    return _finite_inside(encoder, images)


@jax.jit
def _finite_inside(encoder: Encoder, images: Array) -> Array:
    return jnp.isfinite(keeping_nan(encoder)(images)).all(1)


@jax.jit
def _represent(encoder: Encoder, images: Array) -> Array:
    """The encoder, compiled."""
    return encoder(images)


@jax.jit
def _gradient(encoder: Encoder, images: Array) -> Array:
    """Gradient of a random projection of each representation: a norm may be constant."""
    direction = jax.random.normal(jax.random.key(0), (encoder.dimension,))
    return jax.grad(lambda x: (encoder(x) @ direction).sum())(images)


def keeping_nan(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, jittable, whose maxima and minima give NaN for NaN."""

    @functools.wraps(fn)
    def kept(*arrays):
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*arrays)
        results = _evaluate(closed, jax.tree.leaves(arrays))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return kept


def _evaluate(closed: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a traced function, equation by equation."""
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(closed.jaxpr.invars, arguments, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else known[atom]
    for equation in closed.jaxpr.eqns:
        results = _result(equation, [read(atom) for atom in equation.invars])
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _result(equation: Any, values: list[Any]) -> Sequence[Any]:
    """What an equation gives, keeping NaN."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        body = next(params[key] for key in _BODIES if key in params)
        body = ClosedJaxpr(body, ()) if isinstance(body, Jaxpr) else body
        return _evaluate(body, values)
    if name == "scan":
        return _scan(params, values)
    if name == "while":
        return _while(params, values)
    if name == "cond":
        branches = [functools.partial(_branch, branch) for branch in params["branches"]]
        return jax.lax.switch(values[0], branches, *values[1:])
    bound = equation.primitive.get_bind_params(params)
    calls, bound = bound if isinstance(bound, tuple) else ((), bound)  # as JAX's version has it
    results = equation.primitive.bind(*calls, *values, **bound)
    results = results if equation.primitive.multiple_results else [results]
    if name in ("max", "min", "clamp"):
        result = results[0]
        for value in values[1:2] if name == "clamp" else values:
            result = _where_nan(value, result)
        return [result]
    if name in _REDUCTIONS and _is_inexact(values[0]):
        mask = jnp.isnan(values[0]).astype(jnp.result_type(values[0]))
        found = _REDUCTIONS[name].bind(mask, **bound)
        return [jnp.where(found > 0, jnp.full_like(results[0], jnp.nan), results[0])]
    return results


def _where_nan(value: Any, result: Array) -> Array:
    """NaN where a value is."""
    if not _is_inexact(value):
        return result
    return jnp.where(jnp.isnan(value), jnp.full_like(result, jnp.nan), result)


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def _branch(branch: ClosedJaxpr, *values: Any) -> list[Any]:
    """A branch of a condition."""
    return _evaluate(branch, values)


def _scan(params: dict[str, Any], values: list[Any]) -> Sequence[Any]:
    """A `scan` whose body keeps NaN."""
    if "ft_in" in params:  # as JAX's version has it
        num_consts, num_carry = map(len, params["ft_in"].unpack()[:2])
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, rest = values[:num_consts], values[num_consts:]

    def body(carry, x):
        results = _evaluate(params["jaxpr"], [*consts, *carry, *x])
        return results[:num_carry], results[num_carry:]

    carry, stacked = jax.lax.scan(
        body, rest[:num_carry], rest[num_carry:],
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*carry, *stacked]


def _while(params: dict[str, Any], values: list[Any]) -> Sequence[Any]:
    """A `while_loop` whose body keeps NaN."""
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body = values[:num_cond], values[num_cond : num_cond + num_body]
    return jax.lax.while_loop(
        lambda carry: _evaluate(params["cond_jaxpr"], [*of_cond, *carry])[0],
        lambda carry: _evaluate(params["body_jaxpr"], [*of_body, *carry]),
        values[num_cond + num_body :],
    )
