"""Every setting of every configuration takes what its type says, and refuses the rest in a line."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pathlib
import pkgutil
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

import ur_jax
from ur_jax.errors import UserError
from ur_jax.typed import check_types, fits, words

HUGE = 10**400
VALUES = (
    *(None, "x", "", -1, 0, 1, 2.5, -0.5, math.nan, math.inf, -math.inf, True, False, HUGE),
    *((), (1,), ("a",), (None,), [1, 2], {}, {1: 2}, object(), np.arange(2000), b"x", 1j, print),
)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (int, (0, np.int8(3)), (True, 1.0, "1", None, HUGE)),
        (float, (0, 0.5, np.float32(1), math.nan), (True, "1", 1j, HUGE)),
        (bool, (True, np.bool_(False)), (0, 1, None, "yes")),
        (str, ("", "a"), (b"a", None, 1)),
        (int | None, (None, 1), (1.5, "1")),
        (tuple[int, ...], ((), (1, 2)), ([1], (1.5,), 1, "12")),
        (tuple[float, float], ((1, 2.5),), ((1,), (1, 2, 3), [1, 2])),
        (Literal["a", 1], ("a", 1), (True, "b", None)),
        (dict[str, int], ({},), ([], None)),
        (pathlib.Path, (pathlib.Path("a"),), ("a", None)),
        (ValueError, (UserError(),), (KeyError(), "x")),
        (Any, VALUES, ()),
        (Callable[[int], int], VALUES, ()),  # not looked at
    ],
)
def test_types(kind, good, bad):
    assert [value for value in good if not fits(value, kind)] == []
    assert [value for value in bad if fits(value, kind)] == []
    assert words(kind)


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: tuple[int, ...] = (1, 2)
    name: str | None = None

    def __post_init__(self):
        check_types(self, but=(NotImplemented,))


def test_the_message_is_one_line_that_names_field_and_value():
    Settings(), Settings((), "a"), Settings(name=NotImplemented)
    with pytest.raises(UserError) as raised:
        Settings(steps=[1, 2])
    assert str(raised.value) == "Expected steps to be a tuple, each of it an integer, got [1, 2]."
    with pytest.raises(UserError, match="Expected name to be text or None, got array") as raised:
        Settings(name=np.arange(3000).reshape(30, 100))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


def configurations():
    """Every configuration of the package that checks itself and has a default for each field."""
    found_so_far = []
    for module in pkgutil.walk_packages(ur_jax.__path__, "ur_jax."):
        if "torch" in module.name or module.name.endswith("__main__"):
            continue
        for name, found in vars(importlib.import_module(module.name)).items():
            if not (inspect.isclass(found) and found.__module__ == module.name):
                continue
            if not dataclasses.is_dataclass(found) or inspect.isabstract(found):
                continue
            has_defaults = all(
                not (f.default is f.default_factory is dataclasses.MISSING)
                for f in dataclasses.fields(found)
            )
            if has_defaults and "check_types" in _source(found):
                found_so_far.append(pytest.param(found, id=f"{module.name}.{name}"))
    assert len(found_so_far) > 10
    return found_so_far


def _source(found):
    """The code of a class's checks, its parents' too."""
    checks = [base.__dict__.get("__post_init__") for base in found.__mro__]
    return "".join(inspect.getsource(check) for check in checks if inspect.isfunction(check))


@pytest.mark.parametrize("config", configurations())
def test_no_setting_takes_what_it_does_not_mean(config):
    kinds = inspect.get_annotations(config)
    for field in dataclasses.fields(config):
        for value in VALUES:
            try:
                config(**{field.name: value})
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 500
            else:
                kind = kinds.get(field.name)
                assert kind not in ("int", "float") or type(value) in (int, float), field.name
                assert kind != "float" or math.isfinite(value), field.name
                assert value is not HUGE or kind is None or "Any" in kind, field.name
