"""Published PyTorch files, read without running anything in them and mapped without a remainder.

A file either gives every variable of its network, from tensors that are all accounted for, or one
error that lists what is missing, what is unexpected and what has another shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
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

from ur_jax.encoders.zoo.spec import EncoderSpec, Rule
from ur_jax.errors import MissingPackageError, NotFoundError, UserError
from ur_jax.types import PyTree

_LISTED = 10
_AXES = {"same": None, "dense": (1, 0), "conv": (2, 3, 1, 0)}
_CHECK = " Expected exactly the encoder's tensors; check its name and the file."
_COUNTERS = r".*\.num_batches_tracked"


def _plain_dict(*default_factory) -> dict:
    """Stands in for defaultdict, which torch's restricted unpickler makes but cannot fill."""
    return {}


# What training scripts keep beside the tensors. Each only stores what it is given.
_HARMLESS = (
    argparse.Namespace,
    (_plain_dict, "collections.defaultdict"),
    dict,
    list,
    int,
    float,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
)


class Published(NamedTuple):
    """A published file as variables of a network.

    Attributes:
      variables: {"params"[, "batch_stats"]} of NumPy arrays.
      config: keyword arguments of the network that the file decided.
      left_out: keys outside the prefix that the caller gave; empty without one.
      parts: {name: variables} of what else training keeps, see `EncoderSpec.parts`; those that the
        file holds.
    """

    variables: PyTree
    config: dict[str, Any]
    left_out: tuple[str, ...]
    parts: dict[str, PyTree]


def load_published(
    path: str | os.PathLike, spec: EncoderSpec, *, prefix: str | None = None
) -> Published:
    """Reads a published file as the variables of its network, BatchNorm unfolded.

    Args:
      path: a file written by torch.save (needs PyTorch), or `.safetensors` (does not).
      spec: which encoder the file holds.
      prefix: what the encoder's keys start with, such as "backbone.", for a file that does not
        have the published prefix; tensors outside it are left out.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the file needs PyTorch and it is not installed.
      ValueError: for a damaged file, one whose pickle asks for more than data, or one whose
        tensors are not exactly the encoder's.
    """
    contents, tensors = read_tensors(path, spec.groups)
    return map_tensors(tensors, spec, contents, prefix=prefix, file=Path(path).name)


def read_tensors(
    path: str | os.PathLike, groups: tuple[str, ...] = ("state_dict",)
) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
    """Reads the tensors of a file, with no copy of those that NumPy has a dtype for.

    Args:
      path: a file written by torch.save, or `.safetensors`.
      groups: the entries that hold the tensors. In a file without them, the tensors at its top
        level, or else in its only entry of nothing but tensors.

    Returns:
      (contents of the file, {key: array}).

    Raises:
      As `load_published`.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"Expected a weights file, got the directory {path}; name a file in it.")
    if not path.exists():
        raise NotFoundError(f"There is no file {path}; check the path, or fetch it first.")
    if path.suffix == ".safetensors":
        contents = _read_safetensors(path)
    else:
        contents = _read_torch(path)
    tensors: dict[str, np.ndarray] = {}
    for group in _tensor_groups(contents, groups, path):
        tensors |= {key: _as_numpy(tensor) for key, tensor in group.items()}
    return contents, tensors


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


def variable_shapes(
    spec: EncoderSpec, config: Mapping[str, Any], *, folded: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {"/"-separated path: shape and dtype} of the network's variables."""
    return _shapes(spec.network(folded=folded, **config), (*spec.input_size, 3))


def _shapes(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """{"/"-separated path: shape and dtype} of a module's variables."""
    inputs = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    return traverse_util.flatten_dict(variables, sep="/")


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


def file_sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_torch(path: Path) -> Any:
    """Unpickles tensors and plain data; whatever else the pickle asks for is refused by name."""
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(
            f"Reading {path.name} needs PyTorch: pip install 'ur_jax[torch]'. "
            "Or convert it elsewhere, to .safetensors or with experiments/convert_weights.py."
        ) from error

    try:
        with torch.serialization.safe_globals(list(_HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common class for what a bad file can raise
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"Refused to read {path}: its pickle asks for {asked[1]}, which is no plain data "
                "and could run code. Nothing was run. Expected tensors and plain containers; save "
                "the model's state_dict() alone."
            ) from None
        raise UserError(
            f"Expected {path} to be a PyTorch checkpoint or .safetensors, but it cannot be read: "
            f"it is truncated, damaged or of another kind ({_first_line(error)}). Fetch it again."
        ) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError) as error:
        raise UserError(
            f"Expected {path} to be .safetensors, but it cannot be read: it is truncated, damaged "
            f"or of another kind ({_first_line(error)}). Fetch it again."
        ) from error


def _tensor_groups(contents: Any, groups: tuple[str, ...], path: Path) -> list[Mapping[str, Any]]:
    """The dicts of tensors in a file: those expected, or else the only ones there are."""
    is_group = lambda x: isinstance(x, Mapping) and x and all(map(_is_tensor, x.values()))
    if is_group(contents):
        return [contents]
    entries = contents if isinstance(contents, Mapping) else {}
    if groups and all(is_group(entries.get(group)) for group in groups):
        return [entries[group] for group in groups]
    found = [name for name, entry in entries.items() if is_group(entry)]
    if len(found) == 1:
        return [entries[found[0]]]
    kind = f"a dict with {', '.join(map(str, entries))}" if entries else type(contents).__name__
    raise UserError(
        f"Expected {path} to hold its tensors {f'in {groups}' if groups else 'at its top level'}, "
        f"or in one other entry, but it is {kind}; save a state_dict() alone."
    )


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _as_numpy(tensor: Any) -> np.ndarray:
    """A tensor as a NumPy array that shares its memory, where NumPy has the dtype."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


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


def _arrange(array: np.ndarray, layout) -> np.ndarray:
    """The array in our layout, as a view where it can be one."""
    if callable(layout):
        array = layout(array)
    elif _AXES[layout] is not None:
        array = array.transpose(_AXES[layout])
    return array.astype(np.float32, copy=False)


def _misshaped(array: np.ndarray, layout, expected: tuple[int, ...]) -> str | None:
    """What is wrong with the shape or dtype of a source tensor, if anything."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"is {array.dtype}, expected floating point"
    if not callable(layout):
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
    best = max(counts, key=counts.get, default=used)
    if best == used or counts.get(best, 0) <= num_matches:
        return ""
    return (
        f" {counts[best]} of its keys fit below the prefix {best!r} (read with {used!r}): "
        f"pass prefix={best!r}, or --prefix {best or repr('')} to experiments/convert_weights.py."
    )


def _first_line(error: Exception) -> str:
    """The first line of an error's message, after torch's advice, at most 200 characters."""
    message = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
    return (message.splitlines() or [type(error).__name__])[0][:200]
