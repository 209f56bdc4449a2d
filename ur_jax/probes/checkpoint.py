"""A linear probe on disk: a checkpoint that knows which encoder it reads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.encoders import checkpoints
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.probes.classifier import Classifier
from ur_jax.probes.zero_shot import is_zero_shot, load_zero_shot
from ur_jax.runs import fingerprint
from ur_jax.types import Array


def save_probe(
    path: str | os.PathLike,
    trained: Mapping[str, Any],
    encoder: Encoder,
    metadata: Mapping[str, Any],
) -> None:
    """Writes a probe as a checkpoint that knows which encoder it reads.

    Args:
      path: the directory to make; it must not exist.
      trained: {"kernel": (D,K), "bias": (K,)}.
      encoder: what it was trained on.
      metadata: JSON data to keep with it, such as "kind" and "class_names", by which labels are
        compared.

    Raises:
      UserError: if something is at `path` already.
    """
    belongs = {"output": _output(encoder), "weights": _weights(encoder)}
    checkpoints.save_encoder(
        path,
        dict(trained),
        {"encoder": encoder.name, "config": {}, "probe": {**metadata, **belongs}},
    )


def restore_probe(
    path: str | os.PathLike, encoder: Encoder
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Reads a linear probe on an encoder.

    Args:
      path: checkpoint directory.
      encoder: the encoder, with representations of dimension D; in float32 or bfloat16.

    Returns:
      ({"kernel": (D,K), "bias": (K,)}, what `save_probe` kept with it). A probe that was saved
      without it, by `checkpoints.save_encoder`, has {} and is only checked for its shape.

    Raises:
      NotFoundError: if there is no such directory.
      UserError: for a checkpoint of something else, or a probe on another representation or other
        weights.
    """
    trained, metadata = checkpoints.restore_encoder(path)
    known = metadata.get("probe", {})
    expected, output = known.get("output"), _output(encoder)
    if expected not in (None, output):
        raise UserError(
            f"The probe {path} reads the representation {expected!r} of encoder "
            f"{metadata['encoder']!r}, got {output!r} (dimension {encoder.dimension}); load the "
            f"encoder with representation={expected!r}, or train a probe on this one."
        )
    shapes = {name: np.shape(leaf) for name, leaf in trained.items()}
    kernel = shapes.get("kernel", ())
    if set(shapes) != {"kernel", "bias"} or kernel != (encoder.dimension, *shapes["bias"]):
        raise UserError(
            f"Expected a probe with kernel [{encoder.dimension}, K] and bias [K] for encoder "
            f"{encoder.name!r}, got {shapes} in {path}. Train one on this representation."
        )
    if "weights" in known and known["weights"] != _weights(encoder):
        raise UserError(
            f"The probe {path} was trained on other weights of encoder {metadata['encoder']!r} "
            f"than those given; name the encoder that it belongs to, or train another probe."
        )
    return trained, known


def load_probe(
    path: str | os.PathLike, encoder: Encoder, *, sigma: float | None = None
) -> Classifier:
    """Reads a linear probe as the classifier that it makes of its encoder.

    Args:
      path, encoder: see `restore_probe`, which also says what is raised; or a .npy file of class
        embeddings, see `zero_shot`.
      sigma: of the Gaussian noise that it is to classify under; a probe that was trained under
        another is warned of.
    """
    if is_zero_shot(path):
        return load_zero_shot(path, encoder)
    trained, known = restore_probe(path, encoder)
    views = known.get("training", {}).get("views", {})
    if sigma is not None and views.get("kind") == "noisy" and views.get("sigma", sigma) != sigma:
        warnings.warn(
            f"The probe {path} was trained under noise of sigma {views['sigma']:g} and classifies "
            f"under {sigma:g}; where that is not meant, train one with --sigma {sigma:g}.",
            stacklevel=2,
        )
    kernel, bias = (jnp.asarray(trained[name]) for name in ("kernel", "bias"))
    names = tuple(known.get("class_names", ()))
    if names and len(names) != len(bias):
        raise UserError(
            f"Expected a name for each of the {len(bias)} classes of the probe {path}, got "
            f"{len(names)}; save it again with its class_names."
        )
    return Classifier(encoder, kernel, bias, names)


def identified(classifier: Classifier) -> dict[str, str]:
    """What identifies a probe in a record: hashes of its weights and of its classes' names."""
    weights = {"kernel": classifier.kernel, "bias": classifier.bias}
    names = fingerprint(list(classifier.class_names))
    return {"probe": checkpoints.tree_hash(weights), "probe_classes": names}


def _output(encoder: Encoder) -> str:
    """Which output of its network an encoder gives: "paper" and "features" may be the same one."""
    return getattr(encoder.apply_fn, "representation", encoder.representation)


def _weights(encoder: Encoder) -> str:
    """Hash of the weights, rounded to bfloat16: the same for both compute dtypes."""
    cast = lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return checkpoints.tree_hash(jax.tree.map(cast, encoder.params))
