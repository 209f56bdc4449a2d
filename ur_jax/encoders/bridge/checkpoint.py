"""A bridged encoder on disk: its graph as JSON beside the weights, loaded without PyTorch.

The file may be from anywhere. Its graph can only name rows of the table of operations; that the
tensors are the graph's, and how large all results are, is looked at before memory is taken.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ur_jax.encoders import checkpoints
from ur_jax.encoders.base import Encoder, Origin, from_fn
from ur_jax.encoders.bridge.function import GraphFn, collected, evaluate, flat
from ur_jax.encoders.bridge.graph import dumps, loads
from ur_jax.errors import UserError, shown

_KEPT = ("name", "input_size", "preparation", "mean", "std", "representation", "dtype")
_LARGEST_RESULT = 2**31
_LARGEST_TOTAL = 2**34  # parameters
DEFAULT = ("paper", "features")
"""What stands for the representation that a checkpoint has."""


def save(
    path: str | os.PathLike,
    encoder: Encoder,
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a bridged encoder as a checkpoint directory, see `loading.save_encoder`."""
    assert isinstance(encoder.apply_fn, GraphFn)
    tensors = flat(encoder.params)
    names = sorted(tensors)
    bridge = {
        "graph": json.loads(encoder.apply_fn.text),
        "leaves": names,
        "source": encoder.origin.place,
        "arguments": dict(encoder.origin.arguments),
        **{field: getattr(encoder, field) for field in _KEPT},
    }
    checkpoints.save_encoder(
        path,
        {f"leaf{number:05d}": tensors[name] for number, name in enumerate(names)},
        {**metadata, "encoder": encoder.name, "config": {}, "bridge": bridge},
        overwrite=overwrite,
    )


def restore(path: str, representation: str, dtype: str) -> Encoder:
    """The encoder of a checkpoint that `save` wrote.

    Raises:
      UserError: for another representation than it has; for a graph that is damaged, of a later
        format, or not of these weights; as `restore_encoder`.
    """
    stored, metadata = checkpoints.restore_encoder(path, before=check_before)
    bridge = metadata["bridge"]
    if representation not in (*DEFAULT, bridge["representation"]):
        raise UserError(
            f"The checkpoint {path} has one representation, {bridge['representation']!r}, got "
            f"{representation!r}; convert the network again with --output {representation}."
        )
    graph, tensors = loads(_text(metadata))
    leaves = dict(zip(bridge["leaves"], (stored[key] for key in sorted(stored)), strict=True))
    params = {name: jnp.asarray(leaves[name], kind) for name, (kind, _) in tensors.items()}
    text = dumps(graph, _shapes(tensors))
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in bridge.items() if k in _KEPT}
    encoder = from_fn(GraphFn(text), collected(graph, params), **{**settings, "dtype": dtype})
    return encoder.replace(origin=Origin(bridge.get("source"), bridge.get("arguments") or {}))


def _shapes(tensors: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes in the place of tensors."""
    return {name: jax.ShapeDtypeStruct(shape, kind) for name, (kind, shape) in tensors.items()}


def check_before(metadata: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Raises UserError unless a checkpoint's graph is sound and of the weights beside it.

    Args:
      metadata: of the checkpoint.
      shapes: {leaf: what has shape and dtype} of what is stored, not yet read.
    """
    bridge = metadata["bridge"]
    try:
        leaves, size = list(bridge["leaves"]), tuple(bridge["input_size"])
        fields = [bridge[field] for field in _KEPT]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"The checkpoint's record of its network lacks {error}; convert the network again."
        ) from None
    if len(size) != 2 or not all(type(n) is int and 0 < n <= 65_535 for n in size):
        raise UserError(f"Expected an input size of two sides, got {shown(fields[1])}.")
    graph, tensors = loads(_text(metadata))
    stored = {name: tuple(shapes[key].shape) for name, key in zip(leaves, sorted(shapes))}
    wanted = {name: shape for name, (_, shape) in tensors.items()}
    if len(leaves) != len(shapes) or stored != wanted:
        differing = sorted(
            name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name)
        )
        raise UserError(
            f"The checkpoint's weights are not those of its graph: {', '.join(differing[:3])}; "
            "convert the network again."
        )
    if (total := sum(math.prod(shape) for shape in wanted.values())) > _LARGEST_TOTAL:
        raise UserError(f"The checkpoint says that it has {total} parameters; convert it again.")
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    run = lambda params, x: evaluate(graph, params, x, largest=_LARGEST_RESULT)
    try:
        jax.eval_shape(run, _shapes(tensors), images)
    except UserError:
        raise
    except Exception as error:  # a row refuses its arguments in its own way
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"The checkpoint's graph does not fit together: {type(error).__name__}: {text} Convert "
            "the network again."
        ) from error


def _text(metadata: Mapping[str, Any]) -> str:
    """The graph's JSON."""
    return json.dumps(metadata["bridge"].get("graph"), separators=(",", ":"), sort_keys=True)
