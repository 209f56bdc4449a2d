"""The checks of shapes see what they should."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from jaxtyping import Float32, TypeCheckError
from typed_calls import checked

from ur_jax import attacks, certify, distances, metrics
from ur_jax.encoders.base import from_fn
from ur_jax.errors import UserError


def product(
    a: Float32[np.ndarray, "m k"], b: Float32[np.ndarray, "k n"]
) -> Float32[np.ndarray, "m n"]:
    if a.ndim != 2:
        raise UserError(f"Expected a matrix, got shape {a.shape}.")
    return (a @ b).T


def test_shapes_are_checked_after_what_the_function_refuses():
    a, b = np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)
    assert checked(product)(a, b).shape == (2, 2)
    with pytest.raises(TypeCheckError, match="return"):
        checked(product)(a, np.zeros((3, 4), np.float32))
    with pytest.raises(TypeCheckError, match="parameters"):
        checked(product)(a.astype(np.float64), b)
    with pytest.raises(UserError, match="a matrix"):
        checked(product)(a[0], b)


def sums(matrices: Iterable[Float32[np.ndarray, "m k"]]) -> Iterator[float]:
    for matrix in matrices:
        if matrix.ndim != 2:
            raise UserError(f"Expected a matrix, got shape {matrix.shape}.")
        yield float(matrix.sum())


def test_a_generator_refuses_where_it_takes_what_is_bad():
    good, bad = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    assert list(checked(sums)([good])) == [6]
    taken = checked(sums)([bad])
    with pytest.raises(UserError, match="a matrix"):
        next(taken)
    with pytest.raises(TypeCheckError, match="matrices"):
        list(checked(sums)([good.astype(np.float64)]))


def test_public_functions_are_checked():
    for function in (
        attacks.u_pgd,
        attacks.project,
        certify.center_smoothing,
        certify.randomized_smoothing,
        distances.distance,
        from_fn,
        metrics.pairwise_within,
    ):
        assert function.__closure__, function
    with pytest.raises(TypeCheckError):
        metrics.pairwise_within(np.ones((3, 4), np.float32), np.ones(5, bool))
