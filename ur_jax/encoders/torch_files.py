"""Weights files of PyTorch, read without running anything in them. Alone knows torch's formats."""

from __future__ import annotations

import argparse
import codecs
import collections
import datetime
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ur_jax.errors import MissingPackageError, NotFoundError, UserError


def _plain_dict(*default_factory) -> dict:
    """Stands in for defaultdict, which torch's restricted unpickler makes but cannot fill."""
    return {}


# What training scripts keep beside the tensors. Each only stores what it is given.
_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "str", "bytes", "object"),
    *("datetime64[s]", "timedelta64[s]"),
)
_HARMLESS: tuple[Any, ...] = (
    argparse.Namespace,
    (_plain_dict, "collections.defaultdict"),
    collections.Counter,
    collections.deque,
    *(dict, list, tuple, set, int, float, complex, str, bytes, bytearray, slice),
    *(datetime.datetime, datetime.date, datetime.timedelta),
    # A path of the other system, or of another Python, is only a text with slashes.
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name, kind in (
            ("PosixPath", pathlib.PurePosixPath),
            ("WindowsPath", pathlib.PureWindowsPath),
            ("PurePosixPath", pathlib.PurePosixPath),
            ("PureWindowsPath", pathlib.PureWindowsPath),
        )
    ),
    np.dtype,
    np.ndarray,
    *(type(np.dtype(kind)) for kind in _DTYPES),
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in (
            ("scalar", np.float64(0).__reduce__()[0]),
            ("_reconstruct", np.zeros(1).__reduce__()[0]),
        )
    ),
    (codecs.encode, "_codecs.encode"),  # how bytes are written for Python 2
)


class Read(NamedTuple):
    """What a weights file holds.

    Attributes:
      contents: the file, as it is.
      tensors: {key: array} of the group that was asked for.
      skipped: names of the entries of that group that are no arrays of numbers.
    """

    contents: Any
    tensors: dict[str, np.ndarray]
    skipped: tuple[str, ...]


def read_tensors(
    path: str | os.PathLike, groups: tuple[str, ...] = ("state_dict",), *, choose: bool = False
) -> Read:
    """Reads the tensors of a file, with no copy of those that NumPy has a dtype for.

    Args:
      path: a file written by torch.save, or `.safetensors`.
      groups: the entries that hold the tensors, with dots for those inside others. In a file
        without them, the only entry that holds any, or the top level.
      choose: no other entry will do.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the file needs PyTorch and it is not installed.
      UserError: for a damaged file, one whose pickle asks for more than data, or one with several
        entries that hold tensors, or none.
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
    skipped = []
    for group in _chosen(contents, groups, path, choose):
        for key, value in group.items():
            if isinstance(key, str) and _is_tensor(value):
                tensors[key] = _as_numpy(value, key, path)
            else:
                skipped.append(str(key))
    return Read(contents, tensors, tuple(skipped))


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
            "Or convert it elsewhere, to .safetensors or with ur-jax convert-weights."
        ) from error

    try:
        with torch.serialization.safe_globals(list(_HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common class for what a bad file can raise
        if asked := re.search(r"GLOBAL (\S+)|but got <class '(\S+)'>", str(error)):
            raise UserError(
                f"Refused to read {path}: its pickle asks for {asked[1] or asked[2]}, which is no "
                "plain data and could run code. Nothing was run. Expected tensors and plain "
                "containers; save the model's state_dict() alone."
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


def _chosen(
    contents: Any, groups: tuple[str, ...], path: Path, choose: bool
) -> list[Mapping[str, Any]]:
    """The dicts of tensors in a file: those asked for, or else the only ones there are."""
    found = dict(_groups(contents))
    if groups and all(name in found for name in groups):
        return [found[name] for name in groups]
    count = {name: sum(map(_is_tensor, group.values())) for name, group in found.items()}
    shown = ", ".join(f"{name!r} ({n} tensors)" for name, n in count.items() if name)
    if choose:
        raise UserError(
            f"Expected {path} to hold tensors in {groups[0]!r}, but it has "
            f"{shown or 'them at its top level' if found else 'none'}."
        )
    inner = [name for name in found if name]
    top = count.get("", 0)  # beside groups of weights it has a state of random numbers, or so
    if found and top > max((count[name] for name in inner), default=0):
        return [found[""]]
    if len(inner) == 1:
        return [found[inner[0]]]
    if inner:
        raise UserError(
            f"Expected {path} to hold its tensors in one place, but it has several: {shown}. Pick "
            f"one by group={inner[0]!r}, or by --group {inner[0]} of ur-jax convert-weights."
        )
    entries = contents if isinstance(contents, Mapping) else {}
    kind = f"a dict with {', '.join(map(str, entries))}" if entries else type(contents).__name__
    raise UserError(
        f"Expected {path} to hold its tensors {f'in {groups}' if groups else 'at its top level'}, "
        f"or in one other entry, but it is {kind}; save a state_dict() alone."
    )


def _groups(contents: Any, name: str = "", depth: int = 3) -> Iterator[tuple[str, Mapping]]:
    """Yields (dotted name, dict) of the dicts in a file that hold weights themselves."""
    if not isinstance(contents, Mapping) or not depth:
        return
    if any(isinstance(key, str) and _is_weight(value) for key, value in contents.items()):
        yield name, contents
    for key, value in contents.items():
        if isinstance(key, str):
            yield from _groups(value, f"{name}.{key}" if name else key, depth - 1)


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor or array, of numbers; a bare number is none."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "detach")


def _is_weight(value: Any) -> bool:
    """Whether it is a tensor of floating-point numbers: a state of random numbers is none."""
    return _is_tensor(value) and "float" in str(value.dtype)


def _as_numpy(tensor: Any, key: str, path: Path) -> np.ndarray:
    """A tensor as a NumPy array that shares its memory, where NumPy has the dtype."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach()
    narrow = "bfloat16" in str(tensor.dtype) or "float8" in str(tensor.dtype)
    try:
        return (tensor.float() if narrow else tensor).numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"Expected plain dense tensors in {path}, but {key} is {tensor.dtype}, "
            f"{tensor.layout} ({_first_line(error)}); save it dense and unquantized."
        ) from error


def _first_line(error: Exception) -> str:
    """The first line of an error's message, after torch's advice, at most 200 characters."""
    message = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
    return (message.splitlines() or [type(error).__name__])[0][:200]
