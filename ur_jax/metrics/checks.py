"""Checks of representations that the measures share.

Every l2 and cosine distance goes through squares, which float32 holds for a limited range only:
beyond it all distances would be infinite or zero, and an encoder would look perfectly robust or
not at all for its scale alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ur_jax import distances as dist
from ur_jax.errors import UserError
from ur_jax.types import AnyArray, Array

_SPREAD = 1e-6


def in_range(block: AnyArray) -> Array:
    """Whether each row (..., D) is finite, and its squares are."""
    return jnp.all(jnp.abs(block) <= dist.LARGEST, axis=-1)  # not so for NaN


def count_unusable(block: Array, mask: Array | bool = True) -> Array:
    """Number of unmasked rows that hold NaN, infinity or an entry beyond `distances.LARGEST`."""
    return jnp.sum(mask & ~in_range(block))


def matrix(name: str, array: AnyArray) -> Array:
    """The float32 [rows, D] array on the device; UserError if it is not one."""
    dist.check_representations(**{name: array})
    if array.ndim != 2:
        raise UserError(f"Expected {name} of shape [rows, D], got {array.shape}.")
    return jnp.asarray(array)


def usable_matrix(name: str, array: AnyArray) -> Array:
    """`matrix`, if what there is of its values is finite and of a scale that can be measured."""
    rows = matrix(name, array)
    if not isinstance(rows, Tracer):
        bad, largest = jax.device_get(_count_and_largest(rows))
        refuse_unusable(name, int(bad))
        if 0.0 < largest < dist.SMALLEST:
            raise UserError(
                f"Expected {name} whose largest entry is at least {dist.SMALLEST:.0e}, got "
                f"{largest:.1e}: squares of differences would vanish in float32. Multiply the "
                "encoder's output by a constant."
            )
    return rows


def refuse_unusable(name: str, bad: int) -> None:
    """Raises UserError if there are bad rows."""
    if bad:
        raise UserError(
            f"Expected finite {name}, got {bad} rows with NaN or infinite values, or with entries "
            f"beyond {dist.LARGEST:.0e}, whose squares are infinite; check the encoder's weights, "
            "its dtype and the scale of its output."
        )


@jax.jit
def _count_and_largest(rows: Array) -> tuple[Array, Array]:
    """Unusable rows, and the largest entry."""
    return count_unusable(rows), jnp.max(jnp.abs(rows))


def check_spread(representations: AnyArray, whose: str) -> None:
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
