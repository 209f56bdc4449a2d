"""The gate: what every public entry point asks of settings, images, keys and arrays.

    def __post_init__(self):
        check_whole(self, "num_steps", "num_restarts")          # integers, at least 1
        check_number(self, "eps", "step_size", above=0.0)        # finite

A `UserError` names the value, what is expected and what to do, on one line. Values are looked at
only where there are any: a traced array has a shape and a dtype, and its check costs nothing in the
compiled program.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ur_jax.errors import UserError, shown
from ur_jax.types import Array


def check_whole(config: Any, *fields: str, least: int = 1, optional: bool = False) -> None:
    """Raises UserError unless fields of a configuration are integers, no bool, at least `least`.

    Args:
      config: whose attributes to look at.
      *fields: their names.
      least: the smallest value.
      optional: whether None is a value too.
    """
    for field in fields:
        value = getattr(config, field)
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            what = f"{field} >= {least}" + ", or none" * optional
            hint = "" if isinstance(value, numbers.Integral) else ", which is no integer"
            raise UserError(f"Expected {what}, got {shown(value)}{hint}.")


def whole_number(value: Any, what: str, *, least: int | None = None) -> int:
    """An integer, of Python or NumPy, as one of Python.

    Args:
      value: the value; nothing else is rounded to one, such as 2.5, True or None.
      what: its name, for messages.
      least: the smallest value.
    """
    if isinstance(value, (bool, np.bool_)):
        raise UserError(f"Expected {what} as a whole number, got {shown(value)}.")
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"Expected {what} as a whole number, got {shown(value)}.") from None
    if least is not None and number < least:
        raise UserError(f"Expected {what} >= {least}, got {number}.")
    return number


def check_number(
    config: Any,
    *fields: str,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    unit: str = "",
) -> None:
    """Raises UserError unless fields of a configuration are finite numbers in a range.

    Args:
      config: whose attributes to look at.
      *fields: their names.
      above, least: the lower end, left out or with it.
      below, most: the upper end, left out or with it.
      unit: for the message, e.g. "pixel units of [0,1]".
    """
    ends = {">": above, ">=": least, "<": below, "<=": most}
    wanted = " and ".join(f"{sign} {end:g}" for sign, end in ends.items() if math.isfinite(end))
    for field in fields:
        value: Any = getattr(config, field)
        if not (_is_finite(value) and above < value < below and least <= value <= most):
            what = " ".join(part for part in (field, wanted or "finite") if part)
            raise UserError(f"Expected {what}{unit and f', in {unit}'}, got {shown(value)}.")


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold, neither infinite nor NaN."""
    try:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def check_distinct(config: Any, *fields: str) -> None:
    """Raises UserError unless the values of tuples differ, also by the six digits of their names.

    A number is reported, and its parts are kept, under them.
    """
    for field in fields:
        values = getattr(config, field)
        texts = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        if len(set(texts)) < len(texts):
            raise UserError(
                f"Expected {field} that differ, by six digits, got {shown(values)}; leave out what "
                "is there twice."
            )


def check_range(
    config: Any, *fields: str, above: float = -math.inf, most: float = math.inf
) -> None:
    """Raises UserError unless fields of a configuration are two finite numbers, low <= high.

    Args:
      config: whose attributes to look at.
      *fields: their names.
      above, most: what low is above, and high at most.
    """
    for field in fields:
        value = getattr(config, field)
        is_pair = (
            isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_finite, value))
        )
        if not is_pair or not above < value[0] <= value[1] <= most:
            first = f"{above:g} < " if math.isfinite(above) else ""
            wanted = f"{first}low <= high" + (f" <= {most:g}" if math.isfinite(most) else "")
            raise UserError(f"Expected {field} as (low, high) with {wanted}, got {shown(value)}.")


def check_flag(config: Any, *fields: str) -> None:
    """Raises UserError unless fields of a configuration are True or False."""
    for field in fields:
        value = getattr(config, field)
        if not isinstance(value, (bool, np.bool_)):
            raise UserError(f"Expected {field} to be True or False, got {shown(value)}.")


def check_pixels(images: Array | np.ndarray, name: str = "images") -> None:
    """Images (B,H,W,3) floating point of at least 32 bits, each pixel in [0,1]."""
    check_array(name, images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise UserError(f"Expected {name} (B,H,W,3), at least one, got {tuple(images.shape)}.")
    if images.dtype not in (jnp.float32, jnp.float64):
        # Half precision has no room for a perturbation: in bfloat16 1/255 is a step near 1.
        scale = " / 255" if jnp.issubdtype(images.dtype, jnp.integer) else ""
        raise UserError(
            f"Expected floating-point {name} (float32) in [0,1], got {images.dtype}; convert with "
            f"{name}.astype('float32'){scale}."
        )
    if isinstance(images, Tracer):
        return
    xp = jnp if isinstance(images, jax.Array) else np
    # By comparisons, which a NaN fails: on CPUs a vectorised minimum or maximum can lose it.
    if xp.all((images >= 0.0) & (images <= 1.0)):
        return
    bad = int(xp.sum(~xp.isfinite(images)))
    if bad:
        raise UserError(
            f"Expected {name} with pixels in [0,1], got {bad} of NaN or infinity; look where they "
            "come from, and leave those images out."
        )
    low, high = float(images.min()), float(images.max())
    remedy = "divide by 255" if high > 1.5 else "normalise inside the encoder (mean, std), or clip"
    raise UserError(f"Expected {name} with pixels in [0,1], got [{low:g}, {high:g}]; {remedy}.")


def check_finite_array(name: str, array: Array | np.ndarray, shape: tuple[int, ...]) -> None:
    """A finite floating-point array of a shape, of at least 32 bits."""
    check_array(name, array)
    if tuple(array.shape) != tuple(shape) or array.dtype not in (jnp.float32, jnp.float64):
        sizes = ",".join(map(str, shape))
        raise UserError(
            f"Expected {name} ({sizes}) float32, got {tuple(array.shape)} {array.dtype}."
        )
    if not isinstance(array, Tracer) and not jnp.all(jnp.isfinite(array)):
        raise UserError(f"Expected finite {name}, got NaN or infinity in it.")


def check_array(name: str, array: Any) -> None:
    """An array of JAX or NumPy."""
    if not isinstance(array, (jax.Array, np.ndarray)):
        raise UserError(
            f"Expected {name} to be an array, got {type(array).__name__}; make one by np.asarray "
            "or np.stack."
        )


def check_key(key: Any) -> None:
    """A typed key, or an array of them."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return
    got = type(key).__name__ if dtype is None else f"{dtype} of shape {np.shape(key)}"
    old = dtype == jnp.uint32
    raise UserError(
        f"Expected a typed key, jax.random.key(seed), got {got}"
        + ("; jax.random.wrap_key_data makes one of an old jax.random.PRNGKey." if old else ".")
    )


def check_type(name: str, value: Any, kind: type) -> None:
    """A value of a class, such as a config."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise UserError(
            f"Expected {name} to be {article} {kind.__name__}, got {type(value).__name__}."
        )
