"""Zero-shot heads: class embeddings of a text encoder, which need no text encoder any more.

A file of K x D embeddings (.npy), one row of length 1 for each class, is a linear head on an
encoder whose representations live in the same space, as CLIP's and SigLIP's do. Beside
`classes.npy` a file `classes.json` has the classes' names, as a list or as

    {"names": ["cat", "dog"], "logit_scale": 100.0, "bias": 0.0}

where scale and bias, a number or one for each class, change logits and not which is largest, unless
the bias differs between classes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ur_jax.encoders.base import Encoder
from ur_jax.errors import NotFoundError, UserError, shown
from ur_jax.probes.classifier import Classifier

_UNIT = 1e-2
"""How far a row's length may be from 1: embeddings may have been kept in half precision."""


def is_zero_shot(path: str | os.PathLike) -> bool:
    """Whether a path names class embeddings."""
    return os.fspath(path).endswith(".npy")


def load_zero_shot(path: str | os.PathLike, encoder: Encoder) -> Classifier:
    """Reads class embeddings as the classifier that they make of an encoder.

    Args:
      path: a .npy file of K x D numbers, K >= 2; see above for the JSON beside it.
      encoder: with representations of dimension D.

    Raises:
      NotFoundError: if there is no such file, or no names beside it.
      UserError: for another shape, rows that are not finite or not of length 1, or names, a scale
        or a bias that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"There are no class embeddings at {path}; check the path.")
    try:
        with path.open("rb") as file:
            classes = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as .npy ({error}); save it by np.save.") from None
    if not isinstance(classes, np.ndarray) or classes.ndim != 2 or len(classes) < 2:
        shape = getattr(classes, "shape", type(classes).__name__)
        raise UserError(f"Expected K x D class embeddings in {path}, K >= 2, got {shape}.")
    if classes.dtype.kind != "f":
        raise UserError(f"Expected floating-point embeddings in {path}, got {classes.dtype}.")
    if classes.shape[1] != encoder.dimension:
        raise UserError(
            f"Expected class embeddings of the encoder's dimension {encoder.dimension} in {path}, "
            "got "
            f"{classes.shape[1]}: are they of the same model, and is its projection what it gives "
            f"({encoder.representation!r})?"
        )
    classes = classes.astype(np.float32)
    lengths = np.linalg.norm(classes, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _UNIT))
    if len(wrong):
        raise UserError(
            f"Expected class embeddings of length 1 in {path}, but row {wrong[0]} has length "
            f"{lengths[wrong[0]]:.4g} ({len(wrong)} of {len(classes)} differ): divide each by its "
            "norm."
        )
    names, scale, bias = _beside(path.with_suffix(".json"), len(classes))
    return Classifier(encoder, jnp.asarray(classes.T * scale), jnp.asarray(bias), names)


def _beside(path: Path, count: int) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Names, scale and bias of the file beside the embeddings."""
    if not path.is_file():
        raise NotFoundError(
            f"Expected the classes' names in {path}, as a JSON list of {count}, by which labels "
            "are "
            "compared."
        )
    try:
        said: Any = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from None
    said = {"names": said} if isinstance(said, list) else said
    known = {"names", "logit_scale", "bias"}
    if not isinstance(said, dict) or not {"names"} <= set(said) <= known:
        raise UserError(
            f"Expected a list of names, or names, logit_scale and bias, in {path}, got "
            f"{shown(said)}."
        )
    names = said["names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"Expected a list of names in {path}, got {shown(names)}.")
    if len(names) != count or len(set(names)) != count:
        raise UserError(
            f"Expected {count} different names in {path}, one for each row, got {len(names)}, "
            f"{len(set(names))} of them different."
        )
    scale = _number(said.get("logit_scale", 1.0), "logit_scale", path)
    if scale.ndim or scale <= 0:
        raise UserError(
            f"Expected one logit_scale > 0 in {path}, got {shown(said['logit_scale'])}."
        )
    bias = _number(said.get("bias", 0.0), "bias", path)
    if bias.ndim > 1 or (bias.ndim == 1 and len(bias) != count):
        raise UserError(f"Expected one bias or {count} in {path}, got {shown(said['bias'])}.")
    return tuple(names), scale, np.broadcast_to(bias, (count,)).astype(np.float32)


def _number(value: Any, what: str, path: Path) -> np.ndarray:
    """A number, or a list of numbers."""
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        array = np.asarray(np.nan, np.float32)
    if isinstance(value, (str, bool)) or not np.isfinite(array).all():
        raise UserError(f"Expected {what} as a finite number in {path}, got {shown(value)}.")
    return array
