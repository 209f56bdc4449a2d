"""Checks of representations that the measures share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax import distances as dist
from ur_jax.errors import UserError
from ur_jax.types import Array

_SPREAD = 1e-6


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


def check_spread(representations: Array | np.ndarray, whose: str) -> None:
    """Raises UserError if clean representations [rows, D] of several images are one point.

    Such an encoder cannot be attacked and looks perfectly robust; it says nothing about images.
    Equal to float32 rounding, that is: no entry varies by more than 1e-6 of the largest one.

    Args:
      representations: of at least two different images; of fewer, nothing can be said.
      whose: for the message, e.g. "encoder 'mine'".
    """
    if len(representations) < 2:
        return
    values = np.asarray(representations)
    low, high = (f(axis=0).astype(np.float64) for f in (values.min, values.max))
    with np.errstate(invalid="ignore"):  # infinite ones are not for this function to refuse
        spread, scale = (high - low).max(), max(high.max(), -low.min())
    if spread <= _SPREAD * scale:
        raise UserError(
            f"The representations of {whose} are collapsed: {len(values)} images have the same one"
            f" (entries vary by {spread:.1e}, the largest is {scale:.1e}). Nothing about "
            "robustness can be measured of it; check its weights, its preprocessing (mean, std), "
            "or which output it is."
        )
