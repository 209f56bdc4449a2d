"""Every value out of range is one line that names it; every value in range passes."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest

from ur_jax.checks import check_distinct, check_number, check_whole
from ur_jax.errors import UserError


def holding(value):
    return types.SimpleNamespace(field=value)


def test_whole_numbers():
    for value in (1, 2, np.int64(3), 10**30):
        check_whole(holding(value), "field")
    for value in (0, -1, 2.5, 2.0, math.nan, True, "2", None, np.float32(2)):
        with pytest.raises(UserError, match="Expected field >= 1, got") as error:
            check_whole(holding(value), "field")
        assert repr(value) in str(error.value)
    check_whole(holding(None), "field", optional=True)
    check_whole(holding(0), "field", least=0)
    with pytest.raises(UserError, match="Expected field >= 1, or none, got 0"):
        check_whole(holding(0), "field", optional=True)


def test_numbers():
    for value in (1, 0.5, np.float32(0.5), 1e-300):
        check_number(holding(value), "field", above=0.0)
    for value in (0, -0.0, -1.0, math.nan, math.inf, -math.inf, "1", None, True, 1j, 10**400):
        with pytest.raises(UserError, match="Expected field > 0, got"):
            check_number(holding(value), "field", above=0.0)
    check_number(holding(0.0), "field", least=0.0, below=1.0)
    check_number(holding(1.0), "field", least=0.0, most=1.0)
    with pytest.raises(UserError, match="Expected field >= 0 and < 1, in shares, got 1.0"):
        check_number(holding(1.0), "field", least=0.0, below=1.0, unit="shares")
    with pytest.raises(UserError, match="Expected field finite, got nan"):
        check_number(holding(math.nan), "field")


def test_values_that_would_have_one_name():
    """Parts of "attack_0.05" of one radius were taken for those of the other."""
    for values in ((0.05, 0.1), (5, 10), ("a", "b"), ()):
        check_distinct(holding(values), "field")
    for values in ((0.05, 0.05), (0.05, 0.05000004), (5, 5), ("a", "b", "a")):
        with pytest.raises(UserError, match="Expected field that differ, by six digits, got"):
            check_distinct(holding(values), "field")
