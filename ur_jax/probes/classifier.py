"""Classifiers on top of an encoder, as randomized smoothing takes them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.metrics.checks import check_spread, usable_matrix
from ur_jax.types import Array


@struct.dataclass
class Classifier:
    """A linear probe on an encoder: logits = encoder(images) @ kernel + bias. A pytree.

    Attributes:
      encoder: the encoder.
      kernel: [D, K] float32.
      bias: [K] float32.
      class_names: K names, by which labels of images are compared; empty if they are not known.
    """

    encoder: Encoder
    kernel: Array
    bias: Array
    class_names: tuple[str, ...] = struct.field(pytree_node=False, default=())

    def __call__(self, images: Array) -> Array:
        """Returns the logits [B,K] of images [B,H,W,3] in [0,1]."""
        return self.encoder(images) @ self.kernel + self.bias


def nearest_image_classifier(encoder: Encoder, representations: Array | np.ndarray) -> Classifier:
    """Classifier without labels: class j is "nearest, in l2, to the representation of image j".

        argmin_j |f - c_j|^2 = argmax_j 2 <f, c_j - m> - |c_j - m|^2 - 2 <m, c_j - m>

    with m the mean of the c_j, so that a common offset does not cancel.

    Args:
      encoder: the encoder f.
      representations: [K, D] float32, clean representations c_j, K >= 2.

    Raises:
      UserError: for fewer than two of them, not finite ones, or ones that are all the same point.
    """
    usable_matrix("representations", representations)
    if len(representations) < 2:
        raise UserError(f"Expected at least 2 representations, got {len(representations)}.")
    check_spread(representations, f"encoder {encoder.name!r}")
    mean = representations.mean(axis=0)
    shifted = representations - mean
    bias = -(shifted**2).sum(axis=1) - 2 * shifted @ mean
    return Classifier(encoder, jnp.asarray(2 * shifted.T), jnp.asarray(bias))


def num_classes(classifier: Callable[[Array], Array], image_shape: tuple[int, ...]) -> int:
    """Returns K of a classifier, from shapes alone.

    Raises:
      ValueError: if images [B,H,W,C] do not give one array [B,K] with K >= 2.
    """
    images = jax.ShapeDtypeStruct((3, *image_shape), jnp.float32)
    logits = jax.eval_shape(lambda c, x: c(x), classifier, images)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 3 or shape[1] < 2:
        raise UserError(
            f"Expected a classifier that maps images [B,H,W,C] to logits [B,K] with K >= 2, got "
            f"{jax.tree.map(lambda x: x.shape, logits)} for B = 3. Return one row of logits per "
            "image."
        )
    return shape[1]


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError unless every label is a class of a probe with `num_classes` classes."""
    labels = np.asarray(labels)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"Expected labels in [0, {num_classes}), the classes of the probe, got labels from "
            f"{labels.min()} to {labels.max()}. Use a probe trained on this dataset."
        )
