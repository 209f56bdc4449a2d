"""Tensors in a published layout as the variables of a network, mapped without a remainder.

A file either gives every variable of its network, from tensors that are all accounted for, or one
error that lists what is missing, what is unexpected and what has another shape.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ur_jax.encoders import torch_files
from ur_jax.encoders.zoo.spec import EncoderSpec, Rule
from ur_jax.errors import UserError
from ur_jax.types import PyTree

_LISTED = 10
_AXES = {"same": None, "dense": (1, 0), "conv": (2, 3, 1, 0)}
_CHECK = " Expected exactly the encoder's tensors; check its name and the file."
_COUNTERS = r".*\.num_batches_tracked"


class Published(NamedTuple):
    """A published file as variables of a network.

    Attributes:
      variables: {"params"[, "batch_stats"]} of NumPy arrays.
      config: keyword arguments of the network that the file decided.
      left_out: keys outside the prefix that the caller gave; empty without one.
      parts: {name: variables} of what else training keeps, see `EncoderSpec.parts`; those that the
        file holds.
      skipped: names of entries beside the tensors that are none, such as an epoch.
    """

    variables: PyTree
    config: dict[str, Any]
    left_out: tuple[str, ...]
    parts: dict[str, PyTree]
    skipped: tuple[str, ...] = ()


def load_published(
    path: str | os.PathLike,
    spec: EncoderSpec,
    *,
    prefix: str | None = None,
    group: str | None = None,
) -> Published:
    """Reads a published file as the variables of its network, BatchNorm unfolded.

    Args:
      path: a file written by torch.save (needs PyTorch), or `.safetensors` (does not).
      spec: which encoder the file holds; `spec.without_head()` for one of which only the backbone
        is there, or is needed.
      prefix: what the encoder's keys start with, such as "backbone.", for a file that does not
        have the published prefix; tensors outside it are left out.
      group: the entry of the file that holds the tensors, for a file with several.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the file needs PyTorch and it is not installed.
      UserError: for a damaged file, one whose pickle asks for more than data, or one whose
        tensors are not exactly the encoder's.
    """
    groups = spec.groups if group is None else (group,)
    read = torch_files.read_tensors(path, groups, choose=group is not None)
    published = map_tensors(read.tensors, spec, read.contents, prefix=prefix, file=Path(path).name)
    return published._replace(skipped=read.skipped)


def map_tensors(
    tensors: Mapping[str, np.ndarray],
    spec: EncoderSpec,
    contents: Mapping[str, Any] | None = None,
    *,
    prefix: str | None = None,
    file: str = "The file",
) -> Published:
    """Arranges the tensors of a published layout as the variables of its network.

    Args:
      tensors: {key: array} in the published layout.
      spec: the encoder, with its rules.
      contents: what else the file holds, for `spec.config_fn`.
      prefix: what the encoder's keys start with, instead of `spec.prefix`.
      file: what errors call the file.

    Raises:
      ValueError: listing every missing, unexpected and mis-shaped key.
    """
    published = _map_tensors(
        tensors, spec, contents, prefix, file, functools.partial(variable_shapes, spec)
    )
    parts = {} if prefix is not None else _map_parts(tensors, spec, file)
    return published._replace(parts=parts)


def _map_parts(tensors, spec: EncoderSpec, file: str) -> dict[str, PyTree]:
    """What training keeps beside the encoder, each part whole or absent."""
    parts = {}
    for part in spec.parts:
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(part.prefix)}
        if own:
            rules = dataclasses.replace(
                spec, rules=part.rules, prefix=part.prefix, ignored=(), config_fn=lambda *_: {}
            )
            shapes = _shapes(part.module(), part.input_size or (*spec.input_size, 3))
            mapped = _map_tensors(own, rules, {}, None, file, lambda _, shapes=shapes: shapes)
            parts[part.name] = mapped.variables
    return parts


def _map_tensors(tensors, spec: EncoderSpec, contents, prefix, file, shapes_fn) -> Published:
    """`map_tensors` of one module, whose variables are `shapes_fn(config)`."""
    if prefix is None:
        used, left_out = spec.prefix, ()
        names = {key: key for key in tensors}
    else:
        used = prefix and prefix.rstrip(".") + "."
        left_out = tuple(key for key in tensors if not key.startswith(used))
        # From here on, keys are as published: `names` leads back to those in the file.
        names = {spec.prefix + k.removeprefix(used): k for k in tensors if k.startswith(used)}
    matches = {key: found for key in names if (found := _matches(key, spec))}
    if not matches:
        have = ", ".join(list(tensors)[:3]) or "no tensors at all"
        hint = _prefix_hint(tensors, spec, used, 0)
        raise UserError(
            f"{file} holds no tensor of encoder {spec.name!r}; it has {have}.{hint or _CHECK}"
        )

    config = spec.config_fn(contents or {}, {key: tensors[names[key]].shape for key in names})
    expected = shapes_fn(config)
    # Where one key has several rules, the one that this configuration has a place for.
    targets = {
        key: (rule, path)
        for key, found in matches.items()
        for rule, path in reversed(found)
        if path in expected
    }
    arrays, unexpected, misshaped = {}, [], []
    for key, name in names.items():
        array = tensors[name]
        if key in targets:
            rule, path = targets[key]
            problem = _misshaped(array, rule.layout, expected[path].shape)
            if problem:
                misshaped.append(f"{name} {problem}")
            else:
                assert path not in arrays, f"two tensors for {path}"
                arrays[path] = _arrange(array, rule.layout)
        elif not _ignored(key, spec):
            unexpected.append(f"{name} {array.shape}")
    present = {path for _, path in targets.values()}
    missing = [
        f"{_source_key(path, spec, used)}for {path} {expected[path].shape}"
        for path in expected
        if path not in present
    ]
    if missing or unexpected or misshaped:
        hint = _prefix_hint(tensors, spec, used, len(matches))
        problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
        raise _layout_error(f"{file} is not the published layout of {spec.name!r}", problems, hint)
    return Published(traverse_util.unflatten_dict(arrays, sep="/"), config, left_out, {})


def unmapped(
    variables: PyTree, spec: EncoderSpec, like: Mapping[str, np.ndarray], file: str = "The file"
) -> dict[str, np.ndarray]:
    """The inverse of `map_tensors`: variables in the published layout.

    Args:
      variables: {"params"[, "batch_stats"]} of the encoder's network.
      spec: the encoder.
      like: {key: array} in that layout; what is no variable of the network is taken from it.
      file: what errors call it.

    Raises:
      UserError: for a file that has no place for one of the variables, or one of another shape.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
    found, missing = dict(like), set(flat)
    for key, array in like.items():
        for rule, path in _matches(key, spec):
            if path not in flat:
                continue
            if problem := _misshaped(array, rule.layout, flat[path].shape):
                raise UserError(f"{file} is not the layout of {spec.name!r}: {key} {problem}.")
            # Every layout moves numbers about: where to, it says of their positions.
            order = np.arange(array.size, dtype=np.float64).reshape(array.shape)
            moved = (
                order.transpose(_AXES[rule.layout] or range(order.ndim))
                if isinstance(rule.layout, str)
                else rule.layout(order)
            )
            back = np.empty(array.size, np.float32)
            back[np.asarray(moved, np.int64).ravel()] = np.asarray(flat[path], np.float32).ravel()
            found[key] = back.reshape(array.shape)
            missing.discard(path)
    if missing:
        raise UserError(
            f"{file} has no tensor for {len(missing)} of the variables of {spec.name!r}, such as "
            f"{sorted(missing)[0]}; give the file that the encoder is from."
        )
    return found


def variable_shapes(
    spec: EncoderSpec, config: Mapping[str, Any], *, folded: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {"/"-separated path: shape and dtype} of the network's variables."""
    return _shapes(spec.network(folded=folded, **config), (*spec.input_size, 3))


def _shapes(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """{"/"-separated path: shape and dtype} of a module's variables."""
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    flat: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
    return flat


def check_variables(
    variables: PyTree,
    spec: EncoderSpec,
    config: Mapping[str, Any],
    file: str,
    *,
    folded: bool = False,
) -> None:
    """Raises ValueError unless `variables` are exactly those of the encoder's network.

    Args:
      variables: {"params"[, "batch_stats"]} as a checkpoint has them.
      spec: the encoder.
      config: keyword arguments of its network.
      file: what the error calls the checkpoint.
      folded: whether its BatchNorms are folded.
    """
    have = traverse_util.flatten_dict(variables, sep="/")
    expected = variable_shapes(spec, config, folded=folded)
    check_arrays(have, expected, f"{file} does not fit the network of {spec.name!r}")


def check_arrays(have: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raises UserError unless two {name: array or shape} have the same names and shapes.

    Args:
      have: what there is.
      expected: what is needed.
      what: begins the message, which lists what is missing, unexpected or mis-shaped.
    """
    problems = {
        "missing": [f"{k} {expected[k].shape}" for k in expected if k not in have],
        "unexpected": [f"{k} {have[k].shape}" for k in have if k not in expected],
        "mis-shaped": [
            f"{k} is {have[k].shape}, expected {expected[k].shape}"
            for k in have
            if k in expected and have[k].shape != expected[k].shape
        ],
    }
    if any(problems.values()):
        raise _layout_error(what, problems)


def _layout_error(what: str, problems: Mapping[str, list[str]], hint: str = "") -> UserError:
    """Returns the one error for all missing, unexpected and mis-shaped tensors."""
    counts = ", ".join(f"{len(keys)} {kind}" for kind, keys in problems.items())
    lines = []
    for kind, keys in problems.items():
        lines += [f"  {kind}: {key}" for key in keys[:_LISTED]]
        if len(keys) > _LISTED:
            lines.append(f"  {kind}: and {len(keys) - _LISTED} more")
    return UserError("\n".join([f"{what}: {counts}.", *lines, (hint or _CHECK).strip()]))


def _matches(key: str, spec: EncoderSpec) -> list[tuple[Rule, str]]:
    """The rules for a key, each with the destination it gives."""
    if not key.startswith(spec.prefix) or _ignored(key, spec):
        return []
    rest = key.removeprefix(spec.prefix)
    matches = ((rule, re.fullmatch(rule.source, rest)) for rule in spec.rules)
    return [(rule, match.expand(rule.destination)) for rule, match in matches if match]


def _ignored(key: str, spec: EncoderSpec) -> bool:
    """Whether a key is known by name not to be used."""
    return any(re.fullmatch(pattern, key) for pattern in (_COUNTERS, *spec.ignored))


def _arrange(array: np.ndarray, layout: Any) -> np.ndarray:
    """The array in our layout, as a view where it can be one."""
    if not isinstance(layout, str):
        array = layout(array)
    elif (axes := _AXES[layout]) is not None:
        array = array.transpose(axes)
    return array.astype(np.float32, copy=False)


def _misshaped(array: np.ndarray, layout: Any, expected: tuple[int, ...]) -> str | None:
    """What is wrong with the shape or dtype of a source tensor, if anything."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"is {array.dtype}, expected floating point"
    if isinstance(layout, str):
        axes = _AXES[layout]
        source = expected if axes is None else tuple(expected[i] for i in np.argsort(axes))
        return None if array.shape == source else f"is {array.shape}, expected {source}"
    try:
        shape = layout(np.broadcast_to(np.float32(0), array.shape)).shape
    except (ValueError, IndexError):
        shape = "nothing that fits"
    return None if shape == expected else f"is {array.shape}, becomes {shape}, expected {expected}"


def _source_key(destination: str, spec: EncoderSpec, prefix: str) -> str:
    """The key that would fill a destination, found by reading its rule backwards, and a space."""
    for rule in spec.rules:
        pattern = "(.+)".join(map(re.escape, re.split(r"\\\d", rule.destination)))
        if match := re.fullmatch(pattern, destination):
            key = rule.source
            for group in match.groups():
                key = re.sub(r"\([^()]*\)", lambda _, group=group: group, key, count=1)
            key = re.sub(r"\([^()]*\)", "", key).replace("\\", "")
            forth = re.fullmatch(rule.source, key)
            if forth and forth.expand(rule.destination) == destination:
                return f"{prefix}{key} "
    return ""


def _prefix_hint(tensors, spec: EncoderSpec, used: str, num_matches: int) -> str:
    """Suggests the prefix under which most keys are the encoder's, if it is not the one used."""
    prefixes = {key[: dot.end()]: None for key in tensors for dot in re.finditer(r"^|\.", key)}
    counts = {
        prefix: sum(
            bool(_matches(spec.prefix + key.removeprefix(prefix), spec))
            for key in tensors
            if key.startswith(prefix)
        )
        for prefix in prefixes
    }
    best = max(counts, key=lambda prefix: counts[prefix], default=used)
    if best == used or counts.get(best, 0) <= num_matches:
        return ""
    return (
        f" {counts[best]} of its keys fit below the prefix {best!r} (read with {used!r}): "
        f"pass prefix={best!r}, or --prefix {best or repr('')} to ur-jax convert-weights."
    )
