"""Divergences between representations: row by row, and between all pairs of two sets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from ur_jax.errors import UserError, unknown_name
from ur_jax.types import AnyArray, Array, PerRow, PyTree, Rows

DIVERGENCES = ("l1", "l2", "linf", "cosine")

_UNIT_ROUNDOFF = 2.0**-24
_LARGEST_RELATIVE_ERROR = 2.0**-12  # of a squared distance that comes from a matrix product
_ROWS_AT_A_TIME = 8

ROUNDED_UP = 1.0 + 2.0**-10
"""What a certified distance is multiplied by, so that it covers the true one. Of D <= 2^13 numbers
a float32 `distance` is wrong by at most 2^-24 (D / 2 + 3) of itself in l2 and 2^-24 (D + 2) in l1,
whatever the order of the sum, so by 2^-11 at most."""

LARGEST, SMALLEST = 2.0**50, 2.0**-40
"""Of the entries of a representation; the largest of all must be at least `SMALLEST`, or all 0."""


class Distances(NamedTuple):
    """What an attack records about two sets of representations, each of shape [...]."""

    l1: Array
    l2: Array
    linf: Array
    cosine_similarity: Array


def distance(a: Rows, b: Rows, *, divergence: str = "l2") -> PerRow:
    """Distance of each row of `a` to the same row of `b`.

        l1: sum |a - b|      l2: sqrt(sum (a - b)^2)      linf: max |a - b|
        cosine: 1 - <a, b> / (|a| |b|) = |a/|a| - b/|b||^2 / 2

    The second form of the cosine is the one computed: it does not cancel. Equal rows are at
    exactly 0 (cosine: below 1e-13). A zero vector has no direction; it counts as orthogonal to
    every other vector and equal to itself (distances 1 and 0). Gradients are finite for finite
    rows: at a = b that of l2 is 0, of cosine 0 up to rounding, of l1 and linf a subgradient.

    Args:
      a: representations [..., D], float32.
      b: representations of the same shape and dtype.
      divergence: one of `DIVERGENCES`.

    Returns:
      Distances [...], float32, >= 0.

    Raises:
      ValueError: for an unknown divergence, another dtype or unequal shapes.
    """
    check_divergence(divergence)
    check_representations(a=a, b=b)
    if a.shape != b.shape:
        raise UserError(f"Expected a and b of equal shape, got {a.shape} and {b.shape}.")
    return _distance(a, b, divergence=divergence)


@functools.partial(jax.jit, static_argnames="divergence")
def _distance(a: Array, b: Array, *, divergence: str) -> Array:
    """`distance` without the checks."""
    if divergence == "cosine":
        a, b = directions(a), directions(b)
    return reduce_difference(a - b, divergence)


def all_distances(a: Rows, b: Rows) -> Distances:
    """The three norms of a - b and the cosine similarity, row by row.

    Args:
      a: representations [..., D], float32.
      b: representations of the same shape and dtype.

    Returns:
      The four measures, each [...].
    """
    l1, l2, linf, cosine = (distance(a, b, divergence=name) for name in DIVERGENCES)
    return Distances(l1, l2, linf, 1.0 - cosine)


def pairwise_distances(
    a: Float32[AnyArray, "m dim"],
    b: Float32[AnyArray, "n dim"] | None = None,
    *,
    divergence: str = "l2",
) -> Float32[Array, "m n"]:
    """Distances between every row of `a` and every row of `b`, or among the rows of `a`.

    l2 and cosine come from one matrix product in full float32; where its rounding, as
    `squared_l2_by_product` estimates it, could exceed 2^-12 of a squared distance (close pairs, of
    which an encoder has few), the column is computed again from the differences, as in `distance`,
    so that equal and close rows are not lost in cancellation. l1 and linf take a few rows of `b` at
    a time. Memory beyond the arguments: the result a few times, and one copy of `a` (for cosine, of
    `b` too). l2 and cosine have no reverse-mode gradient here; use `distance` for that.

    Args:
      a: representations [M, D], float32.
      b: representations [N, D], float32; `a` itself if left out, with exact zeros on the diagonal.
      divergence: one of `DIVERGENCES`.

    Returns:
      Distances [M, N], float32, >= 0.

    Raises:
      ValueError: for an unknown divergence, another dtype or unequal dimensions.
    """
    check_divergence(divergence)
    check_representations(a=a, **({} if b is None else {"b": b}))
    if a.ndim != 2 or (b is not None and (b.ndim != 2 or a.shape[1] != b.shape[1])):
        shapes = a.shape if b is None else (a.shape, b.shape)
        raise UserError(f"Expected a [M, D] and b [N, D], got shapes {shapes}.")
    return _pairwise_distances(a, b, divergence=divergence)


@functools.partial(jax.jit, static_argnames="divergence")
def _pairwise_distances(a: Array, b: Array | None, *, divergence: str) -> Array:
    """`pairwise_distances` without the checks."""
    if divergence in ("l1", "linf"):
        column = lambda row: reduce_difference(a - row, divergence)
        return jax.lax.map(column, a if b is None else b, batch_size=_ROWS_AT_A_TIME).T
    if divergence == "cosine":
        a, b = directions(a), None if b is None else directions(b)
    same = b is None
    b = a if same else b
    squared, error = squared_l2_by_product(a, b)
    inaccurate = error > _LARGEST_RELATIVE_ERROR * squared
    if same:
        diagonal = jnp.eye(a.shape[0], dtype=bool)
        squared, inaccurate = jnp.where(diagonal, 0.0, squared), inaccurate & ~diagonal

    def column_again(j, squared):
        return squared.at[:, j].set(jnp.sum((a - b[j]) ** 2, axis=-1))

    squared = for_flagged_columns(inaccurate, column_again, squared)
    return jnp.sqrt(squared) if divergence == "l2" else 0.5 * squared


def squared_l2_by_product(
    a: Float32[AnyArray, "m dim"], b: Float32[AnyArray, "n dim"]
) -> tuple[Float32[Array, "m n"], Float32[Array, "m n"]]:
    """Squared l2 distances of all pairs by one matrix product, and an estimate of their error.

        |a - b|^2 = |a - m|^2 + |b - m|^2 - 2 (<a - m, b> - <a - m, m>),    m = mean of b

    The shift by m keeps a common offset of all representations from cancelling; it is applied
    to `a` only inside the product, so that no copy of `b` is made.

    Args:
      a: representations [M, D], float32.
      b: representations [N, D], float32.

    Returns:
      The squares [M, N], >= 0, and an estimate [M, N] of their rounding error,
      (4 + sqrt(D)/6) 2^-24 of the terms that cancel. It is no bound: a worst case grows by D, and
      would have every pair measured again. Where roundings are independent (features of both
      signs, rectified, with a common offset, heavy-tailed) no error seen exceeds it; where they all
      go one way (rows of one value each, or a few features far larger than the rest) errors of 2 to
      41 times the estimate were seen. Two pairs whose squares differ by less than that may then be
      taken in the wrong order.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    centre = jnp.mean(b, axis=0)
    shifted = a - centre
    a_square = jnp.sum(shifted**2, axis=-1)[:, None]
    b_square = jnp.sum((b - centre) ** 2, axis=-1)[None]
    row = a_square + 2.0 * product(shifted, centre)[:, None]
    squared = jnp.maximum(row + b_square - 2.0 * product(shifted, b.T), 0.0)
    lengths = jnp.sqrt(jnp.sum(b**2, axis=-1)) + jnp.sqrt(jnp.sum(centre**2))
    products = 2.0 * jnp.sqrt(a_square) * lengths[None]  # what 2 <a - m, b - m> can cancel from
    return squared, relative_rounding(a.shape[-1]) * (a_square + b_square + products)


def relative_rounding(dimension: int) -> float:
    """Relative rounding of a float32 sum of `dimension` products: an estimate, no bound."""
    return (4.0 + dimension**0.5 / 6.0) * _UNIT_ROUNDOFF


def for_flagged_columns(
    flags: Array, body_fn: Callable[[Array, PyTree], PyTree], carry: PyTree
) -> PyTree:
    """Folds `body_fn(column, carry)` over the columns of `flags` [M, N] that hold a True."""

    def body(left_and_carry):
        left, carry = left_and_carry
        column = jnp.argmax(left)  # the first that is left
        return left.at[column].set(False), body_fn(column, carry)

    return jax.lax.while_loop(lambda x: jnp.any(x[0]), body, (jnp.any(flags, axis=0), carry))[1]


def reduce_difference(difference: Rows, divergence: str) -> PerRow:
    """Norm of differences [..., D] over the last axis; for cosine, of differences of directions."""
    if divergence == "l1":
        return jnp.sum(jnp.abs(difference), axis=-1)
    if divergence == "linf":
        # XLA's vectorised maximum on the CPU can lose a NaN.
        largest = jnp.max(jnp.abs(difference), axis=-1)
        return jnp.where(jnp.any(jnp.isnan(difference), axis=-1), jnp.nan, largest)
    squared = jnp.sum(difference**2, axis=-1)
    if divergence == "cosine":
        return 0.5 * squared
    # sqrt has an infinite slope at 0: keep 0 out of it, and let NaN through.
    zero = squared == 0.0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))


def directions(x: Rows) -> Float32[Array, "*rows dim+1"]:
    """Unit vectors [..., D + 1] of rows [..., D]; the last coordinate is that of zero vectors."""
    # Rows whose squares float32 can't hold, or would lose, are scaled first; others by exactly 1.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    held = (largest <= LARGEST) & (largest >= SMALLEST) | (largest == 0.0)
    x = x / jnp.where(held | ~jnp.isfinite(largest), 1.0, largest)
    squared = jnp.sum(x**2, axis=-1, keepdims=True)
    zero = squared == 0.0
    unit = x / jnp.sqrt(jnp.where(zero, 1.0, squared))
    return jnp.concatenate([unit, zero.astype(x.dtype)], axis=-1)


def check_divergence(divergence: str) -> None:
    """Raises ValueError, with near names, unless `divergence` is one of `DIVERGENCES`."""
    if divergence not in DIVERGENCES:
        raise unknown_name("divergence", divergence, DIVERGENCES)


def check_representations(**arrays: Array | np.ndarray) -> None:
    """Raises ValueError unless each array is float32 and has rows, naming the first that is not."""
    for name, array in arrays.items():
        dtype, shape = getattr(array, "dtype", type(array).__name__), np.shape(array)
        if dtype != np.float32:
            raise UserError(
                f"Expected {name} to be a float32 array, got {dtype}; use {name}.astype('float32')."
            )
        if not shape or 0 in shape:
            raise UserError(f"Expected {name} of shape [..., D], none empty, got {shape}.")
