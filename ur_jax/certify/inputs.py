"""What every certificate asks of its model, its images and their indices, before it samples."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence, Sized
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax.certify.noise import check_grid
from ur_jax.checks import (
    check_array,
    check_key,
    check_number,
    check_pixels,
    check_type,
    check_whole,
)
from ur_jax.encoders.base import Encoder, check_images
from ur_jax.errors import UserError, unknown_name
from ur_jax.types import Array


def check_arguments(key: Any, config: Any, kind: type, mesh: Any, batch_size: Any) -> None:
    """Raises UserError for arguments of a kind of certificate that are of another type."""
    check_type("config", config, kind)
    check_one_key(key)
    if mesh is not None:
        check_type("mesh", mesh, Mesh)
    check_whole(SimpleNamespace(batch_size=batch_size), "batch_size")


def check_one_key(key: Any) -> None:
    """Raises UserError unless it is one typed key."""
    check_key(key)
    if key.shape != ():
        raise UserError(f"Expected one key of the run, got {key.shape}; an image's is folded in.")


def check_classifier(classifier: Any) -> None:
    """Raises UserError for an encoder, whose representation has no classes, and for no function.

    What the function gives is looked at with the first image, see `num_classes`.
    """
    if isinstance(classifier, Encoder):
        raise UserError(
            "Expected a classifier, got an Encoder: a representation has no classes. Give a "
            "Classifier (a probe on the encoder, or nearest_image_classifier), or certify the "
            "encoder by a CenterConfig."
        )
    if not callable(classifier):
        raise UserError(
            f"Expected a classifier of images (B,H,W,3), got {type(classifier).__name__}."
        )


def paired(
    images: Iterable[Any], indices: Iterable[int] | None, model: Any, noise: str = "float"
) -> Iterator[tuple[int, Array | np.ndarray]]:
    """Each image with its index, checked as it is taken; an index is taken after its image.

    Args:
      images: [H,W,3] in [0,1] each.
      indices: whole numbers from 0 on; 0, 1, ... by default.
      model: an encoder, a classifier on one, or any function of images.
      noise: "grid" asks for images of 256 grey values.

    Returns:
      (index, image [H,W,3] floating point) of each image.

    Raises:
      UserError: for an image that is not one, or more images than indices, or fewer; where it is
        taken.
    """
    sizes = [len(each) for each in (images, indices) if isinstance(each, Sized)]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        raise UserError(f"Expected an index for each image, got {sizes[1]} for {sizes[0]} images.")
    if isinstance(images, (jax.Array, np.ndarray)) and images.ndim != 4:
        raise UserError(f"Expected images [N,H,W,3], got an array of shape {images.shape}.")
    encoder = model if isinstance(model, Encoder) else getattr(model, "encoder", None)
    return _paired(images, indices, encoder, noise)


def _paired(
    images: Iterable[Any], indices: Iterable[int] | None, encoder: Encoder | None, noise: str
) -> Iterator[tuple[int, Array | np.ndarray]]:
    """The pairs."""
    given = itertools.count() if indices is None else iter(indices)
    for image in images:
        index = next(given, None)
        if index is None:
            raise UserError("Expected an index for each image, got more images than indices.")
        is_whole = isinstance(index, numbers.Integral) and not isinstance(index, bool)
        if not (is_whole and 0 <= index < 2**31):
            raise UserError(f"Expected indices of images in [0, 2^31), got {index!r}.")
        try:
            check_image(image, encoder)
            if noise == "grid":
                check_grid(image)
        except UserError as error:
            raise UserError(f"Image {index}: {error}") from error
        yield int(index), image


def check_image(image: Any, encoder: Encoder | None = None) -> None:
    """Raises UserError unless it is one image [H,W,3] in [0,1], of an encoder's input size."""
    check_array("image", image)
    if image.ndim != 3:
        raise UserError(f"Expected an image [H,W,3], got an array of shape {image.shape}.")
    check_pixels(image[None])
    if encoder is not None and isinstance(encoder, Encoder):
        check_images(encoder, jnp.asarray(image[None], jnp.float32))


def check_samples(number: int) -> None:
    """Raises UserError for more samples of an image than have a number on the device, an int32."""
    if number >= 2**31:
        got = str(number) if number < 2**63 else "many more"
        raise UserError(
            f"Expected less than 2^31 samples of an image, got {got}; lower n0, n or step."
        )


def check_name(kind: str, value: Any, valid: Sequence[str]) -> None:
    """Raises UserError unless it is one of some names."""
    if not isinstance(value, str) or value not in valid:
        raise unknown_name(kind, " ".join(str(value).split())[:80], valid)


def check_each(name: str, values: Any, *, zero: bool) -> None:
    """Raises UserError unless it is a tuple of finite numbers > 0, or >= 0 if `zero`."""
    if not isinstance(values, tuple):
        raise UserError(f"Expected {name} as a tuple of numbers, got {values!r}.")
    for value in values:
        least, above = (0.0, -math.inf) if zero else (-math.inf, 0.0)
        try:
            check_number(SimpleNamespace(value=value), "value", least=least, above=above)
        except UserError:
            wanted = ">= 0" if zero else "> 0"
            raise UserError(f"Expected finite {name} {wanted}, got {value!r}.") from None
