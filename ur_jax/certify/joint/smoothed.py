"""The smoothed encoders themselves: what a user computes, and the certificates are about."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax.certify.inputs import check_one_key, paired
from ur_jax.certify.joint.center import StreamCenter, StreamCenterConfig
from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.joint.cosine import Cosine, CosineConfig, unit
from ur_jax.certify.joint.geometric_median import (
    GRADIENT,
    GeometricMedian,
    GeometricMedianConfig,
    geometric_median,
)
from ur_jax.certify.joint.mean import Mean, MeanConfig, check_dimension, clipped
from ur_jax.certify.joint.neighbour import Directions, Neighbour, NeighbourConfig
from ur_jax.certify.joint.stream import Part, certify_stream, represent, stream_key
from ur_jax.checks import check_type
from ur_jax.data.batches import image_batches
from ur_jax.data.sources import open_images
from ur_jax.devices import data_mesh, replicate
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError, unknown_name
from ur_jax.types import AnyArray, Array, Key, PyTree

_METHODS = {
    "geometric_median": GeometricMedianConfig,
    "mean": MeanConfig,
    "cosine": CosineConfig,
    "neighbour": NeighbourConfig,
}
STREAMS = tuple(_METHODS)
"""Names of the certificates of a stream."""

_NUM_IMAGES, _BATCH = 64, 16


def part_of(model: Encoder | Directions, config: StreamConfig) -> tuple[Part, PyTree]:
    """The certificate of settings, and the arrays that it needs; an entry of `certify_stream`.

    Args:
      model: the encoder; of a `NeighbourConfig` its `Directions`.
      config: the settings of a certificate of this package.

    Raises:
      UserError: for other settings, or another model.
    """
    if isinstance(config, NeighbourConfig):
        check_type("the model of these settings", model, Directions)
        assert isinstance(model, Directions)
        return Neighbour(config), model.bank
    check_type("the model of these settings", model, Encoder)
    assert isinstance(model, Encoder)
    if isinstance(config, StreamCenterConfig):
        return StreamCenter(config), ()
    if isinstance(config, GeometricMedianConfig):
        return GeometricMedian(config), ()
    if isinstance(config, MeanConfig):
        check_dimension(model.dimension)
        return Mean(config), ball_of(model, config)
    if isinstance(config, CosineConfig):
        return Cosine(config), ()
    names = ", ".join(kind.__name__ for kind in _METHODS.values())
    raise UserError(f"Expected the settings of a certificate of a stream ({names}), got {config}.")


def certify_alone(
    model: Encoder | Directions,
    images: Iterable[Array],
    key: Key,
    *,
    config: StreamConfig,
    indices: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int], Any] = lambda num_samples: None,
) -> Iterator[tuple[int, Any]]:
    """Certifies images by one certificate of a stream; see `certify_stream`, and the certificate.

    Args: see `certify_stream`; `model` and `config` see `part_of`.
    """
    part = part_of(model, config)
    encoder = model.encoder if isinstance(model, Directions) else model
    found = certify_stream(
        encoder, images, key, parts={"it": part}, indices=indices, mesh=mesh,
        batch_size=batch_size, on_progress=on_progress,
    )  # fmt: skip
    return ((index, certificates["it"]) for index, certificates in found)


def smoothed(
    encoder: Encoder,
    images: Iterable[AnyArray],
    key: Key,
    *,
    method: str = "geometric_median",
    m: int = 10_000,
    config: StreamConfig | None = None,
    indices: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Represents images by the smoothed encoder, from m noisy samples each.

    What the certificates' guarantees call "what a user computes": the geometric median of the
    samples, the mean of the clipped samples, or the mean of their directions (of cosine and
    neighbour), whose direction is meant. Its noise is keyed by the image's index and is not that
    of the certificates under the same key.

    Args:
      encoder: the encoder.
      images: images [H,W,3] float32 in [0,1], or one array [N,H,W,3].
      key: typed key.
      method: "geometric_median", "mean", "cosine" or "neighbour".
      m: samples of each image, >= 1; as the certificate's `m`, or more.
      config: the certificate's settings: sigma, noise, clip, step and of the mean its ball; those
        of the method by default.
      indices: index of each image, which keys its noise; 0, 1, ... by default.
      mesh: devices to use; all local ones by default.
      batch_size: samples per device and forward pass.

    Returns:
      [N, D] float32.

    Raises:
      UserError: for an unknown method or other settings than its own, for an image that is none, or
        whose samples are not finite or have no geometric median within 500 steps.
    """
    if method not in _METHODS:
        raise unknown_name("smoothed encoder", method, tuple(_METHODS))
    config = _METHODS[method]() if config is None else config
    check_type("config", config, _METHODS[method])
    check_type("encoder", encoder, Encoder)
    check_one_key(key)
    mesh = mesh or data_mesh()
    ball = ball_of(encoder, config) if isinstance(config, MeanConfig) else ()
    whole, own = replicate(mesh, (encoder, stream_key(key, "smoothed")))
    draw = functools.partial(
        represent, whole, own, config=config, mesh=mesh, batch_size=batch_size, most=m
    )
    found = []
    for index, image in paired(images, indices, encoder, config.noise):
        image = replicate(mesh, jnp.asarray(image, jnp.float32))
        pieces = [draw(image, index, start) for start in range(0, m, config.step)]
        samples = jax.device_put(jnp.concatenate(pieces)[:m], mesh.devices.flat[0])
        if not bool(jnp.isfinite(samples).all()):
            raise UserError(f"Expected finite representations of image {index}, got NaN or more.")
        if method == "geometric_median":
            median, left = geometric_median(samples)
            if float(left) > GRADIENT:
                raise UserError(
                    f"The geometric median of image {index} was not found in 500 steps: what is "
                    f"left of its gradient is {float(left):.2g}. Use more samples, or the mean."
                )
            found.append(median)
        elif method == "mean":
            found.append(clipped(samples, *ball).mean(axis=0))
        else:
            found.append(unit(samples).mean(axis=0))
    return np.stack(jax.device_get(found))


def ball_of(encoder: Encoder, config: MeanConfig) -> tuple[Array, Array]:
    """The ball that the mean clips to: that of `clip_ball`, with the settings' radius."""
    middle, radius = clip_ball(encoder)
    return jnp.asarray(middle), jnp.float32(radius if config.ball is None else config.ball)


def clip_ball(encoder: Encoder) -> tuple[np.ndarray, float]:
    """A ball that next to no representation of the encoder leaves, fixed for it: (middle [D], B).

    About the mean representation of 64 of the images that ship, with the largest distance among
    them, rounded up to 1, 1.25, 1.5 or 1.75 times a power of 2; the middle is rounded to multiples
    of B / 64, so that a machine's rounding changes neither. It is part of the smoothed mean,
    whatever it is: a smaller one clips more, and makes the certificate tighter.
    """
    middle, radius = _clip_ball(encoder)
    return middle, radius


@functools.lru_cache(maxsize=8)
def _clip_ball(encoder: Encoder) -> tuple[np.ndarray, float]:
    source = open_images("demo")
    positions = np.linspace(0, len(source) - 1, _NUM_IMAGES).astype(int)
    batches = image_batches(
        source, positions, input_size=encoder.input_size, preparation=encoder.preparation,
        batch_size=_BATCH,
    )  # fmt: skip
    found = np.concatenate([np.asarray(encoder(batch.images), np.float64) for batch in batches])
    middle = found.mean(axis=0)
    largest = float(np.linalg.norm(found - middle, axis=1).max())
    if not 0 < largest < math.inf:
        raise UserError(
            "Expected finite representations of the images that ship, not all the same, got a "
            f"largest distance of {largest} from their mean."
        )
    power = 2.0 ** math.floor(math.log2(largest))
    radius = power * math.ceil(4 * largest / power) / 4
    return (np.round(middle / radius * 64) * radius / 64).astype(np.float32), radius
