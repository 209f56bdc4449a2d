"""Settings out of their range: one line that names the field, what is expected and what came.

def __post_init__(self):
    check_whole(self, "num_steps", "num_restarts")          # integers, at least 1
    check_number(self, "eps", "step_size", above=0.0)        # finite
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

from ur_jax.errors import UserError


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
            raise UserError(f"Expected {what}, got {value!r}{hint}.")


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
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        is_finite = is_number and abs(value) <= sys.float_info.max  # false for NaN
        if not (is_finite and above < value < below and least <= value <= most):
            what = " ".join(part for part in (field, wanted or "finite") if part)
            raise UserError(f"Expected {what}{unit and f', in {unit}'}, got {value!r}.")
