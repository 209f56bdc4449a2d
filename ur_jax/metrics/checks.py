"""Checks of representations that the measures share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax import distances as dist
from ur_jax.errors import UserError
from ur_jax.types import Array


def count_not_finite(block: Array, mask: Array | bool = True) -> Array:
    """Number of unmasked rows that hold NaN or inf."""
    return jnp.sum(mask & ~jnp.all(jnp.isfinite(block), axis=-1))


def finite_matrix(name: str, array: Array | np.ndarray) -> Array:
    """The float32 [rows, D] array on the device; ValueError if it is not one, or not finite."""
    dist.check_representations(**{name: array})
    if array.ndim != 2:
        raise UserError(f"Expected {name} of shape [rows, D], got {array.shape}.")
    array = jnp.asarray(array)
    if not isinstance(array, jax.core.Tracer):
        refuse_not_finite(name, int(count_not_finite(array)))
    return array


def refuse_not_finite(name: str, bad: int) -> None:
    """Raises ValueError if there are bad rows."""
    if bad:
        raise UserError(
            f"Expected finite {name}, got {bad} rows with NaN or infinite values; check the "
            f"encoder's weights and dtype."
        )
