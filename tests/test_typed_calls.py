"""The checks of shapes see what they should."""

from __future__ import annotations

import numpy as np
import pytest
from jaxtyping import Float32, TypeCheckError
from typed_calls import checked

from ur_jax import attacks, distances, metrics
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


def test_public_functions_are_checked():
    for function in (attacks.u_pgd, attacks.project, distances.distance, metrics.pairwise_within):
        assert function.__closure__, function
    with pytest.raises(TypeCheckError):
        metrics.pairwise_within(np.ones((3, 4), np.float32), np.ones(5, bool))
