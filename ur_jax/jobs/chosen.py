"""Flags of settings that depend on a choice among registered kinds, such as a training method.

The base class of such settings has `choices`, their `Registry`, and `flag`, the name of the flag
that chooses. The command line has that flag and the fields of all registered kinds, so that what a
plugin registers is there too. A flag that several kinds have is one; one that the chosen kind lacks
is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, Literal, get_type_hints

from tyro.constructors import StructConstructorSpec, StructFieldSpec, StructTypeInfo

from ur_jax.errors import UserError
from ur_jax.registry import Registry


def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Reads such settings, for a registry of tyro's constructors."""
    kinds = getattr(info.type, "choices", None)
    if not isinstance(kinds, Registry):
        return None
    default = info.default if type(info.default) in kinds.values() else next(iter(kinds.values()))()
    flag, fields = default.flag, _fields(kinds, default)

    def make(**given: Any) -> Any:
        kind = kinds[given.pop(flag)]
        own = {field.name for field in dataclasses.fields(kind)}
        for field in fields:
            if field.name not in own and given[field.name] != field.default:
                raise UserError(
                    f"Expected no --{field.name.replace('_', '-')} with --{flag} {kind.name}, "
                    f"which has no such setting, got {given[field.name]}; leave it out."
                )
        return kind(**{name: value for name, value in given.items() if name in own})

    names: Any = Literal[tuple(kinds)]
    choice = StructFieldSpec(flag, names, default.name, f"The {kinds.kind}.")
    return StructConstructorSpec(make, (choice, *fields))


def _fields(kinds: Registry[Any], default: Any) -> list[StructFieldSpec]:
    """The fields of all kinds; values of an instance come first, then each kind's own defaults."""
    found: dict[str, StructFieldSpec] = {}
    for kind in (type(default), *kinds.values()):
        types, texts = get_type_hints(kind), _texts(kind)
        for field in dataclasses.fields(kind):
            value = getattr(default if isinstance(default, kind) else kind(), field.name)
            spec = StructFieldSpec(field.name, types[field.name], value, texts.get(field.name))
            found.setdefault(field.name, spec)
    return list(found.values())


def _texts(kind: type) -> dict[str, str]:
    """What the docstring of a class says of its attributes."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^  (\w+): (.*(?:\n {4,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
