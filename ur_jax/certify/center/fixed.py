"""Center smoothing with fixed numbers of fresh samples: one check of the center, one bound."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax.certify.center.certificate import (
    CenterCertificate,
    FreshSamples,
    bound_of,
    make_certificate,
)
from ur_jax.certify.center.config import CenterConfig
from ur_jax.certify.enclosing import Center
from ur_jax.certify.sampling import sample_outputs
from ur_jax.distances import distance
from ur_jax.encoders.base import Encoder
from ur_jax.stats.bounds import (
    accepting_count,
    clopper_pearson_lower,
    hoeffding_level,
    interpolated_rank,
)
from ur_jax.types import Array, Key

_STORED_ALPHAS = np.geomspace(0.5, 1e-9, 28)


def fixed(
    encoder: Encoder,
    centered: Iterable[tuple[int, Array, Center]],
    key: Key,
    config: CenterConfig,
    mesh: Mesh,
    batch_size: int,
    on_progress: Callable[[int], Any],
) -> Iterator[tuple[int, CenterCertificate]]:
    """Checks and bounds, one image after the other; see `center_smoothing`.

    Args:
      centered: (index, image, center) of each image.
      (the others): of `center_smoothing`.
    """
    ranks = _stored_ranks(config)

    def start(index, image, center):
        distances = sample_outputs(
            _DistanceFromCenter(config.divergence),
            (encoder, center.center),
            image,
            key,
            jnp.int32(index),
            jnp.int32(config.n0),
            n=config.n0 + config.n,
            sigma=config.sigma,
            clip=config.clip,
            noise=config.noise,
            mesh=mesh,
            batch_size=batch_size,
        )
        return index, center, _summarise(distances, center.radius, ranks, n0=config.n0)

    def finish(index, center, summary):
        center, (num_in_ball, statistics, num_bad) = jax.device_get((center, summary))
        on_progress(config.n0 + config.n)
        eps_out, checked = _bound(config, int(num_in_ball), statistics, ranks)
        fresh = FreshSamples(
            eps_out=eps_out if checked else math.inf,
            checked=checked,
            num_in_ball=int(num_in_ball),
            num_checked=config.n0,
            distances=statistics,
            counts=ranks,
            n=config.n,
            num_drawn=2 * config.n0 + config.n,
            num_bad=num_bad,
        )
        return index, make_certificate(center, fresh)

    # One image is always queued behind the one that is read, so that the device does not wait.
    running = None
    for job in centered:
        queued = start(*job)
        if running is not None:
            yield finish(*running)
        running = queued
    if running is not None:
        yield finish(*running)


@dataclass(frozen=True)
class _DistanceFromCenter:
    """Distances of representations from a center; equal objects share a compilation."""

    divergence: str

    def __call__(self, operand, images):
        encoder, center = operand
        representations = encoder(images)
        away = distance(
            representations,
            jnp.broadcast_to(center, representations.shape),
            divergence=self.divergence,
        )
        if self.divergence != "linf":
            return away
        # On CPUs a maximum may lose a NaN; sums keep it.
        return jnp.where(jnp.isfinite(representations).all(axis=1), away, jnp.nan)


def _bound(
    config: CenterConfig, num_in_ball: int, statistics: np.ndarray, ranks: np.ndarray
) -> tuple[float, bool]:
    """The bound from the order statistics of these ranks, and whether the center is verified."""
    if config.bound == "hoeffding":
        rank = _interpolated(config)
        quantile = np.interp(rank, ranks, statistics.astype(np.float64))
        least = (0.5 - config.delta + _hoeffding_margin(config)) * config.n0
        return config.factor * float(quantile), num_in_ball >= least
    eps_out = bound_of(statistics, ranks, config.n, config)
    lower = clopper_pearson_lower(num_in_ball, config.n0, config.alpha1 / 2)
    return eps_out, bool(lower >= 0.5 - config.delta)


def _interpolated(config: CenterConfig) -> float:
    """Where the published code reads the quantile, counted from 1."""
    return interpolated_rank(config.n, hoeffding_level(config.n, config.level, config.alpha2))


def _hoeffding_margin(config: CenterConfig) -> float:
    """Allowance for the fraction of fresh samples inside the ball, by Hoeffding."""
    return math.sqrt(math.log(2 / config.alpha1) / (2 * config.n0))


def _stored_ranks(config: CenterConfig) -> np.ndarray:
    """Ranks of the order statistics to keep: about the bound, and for other alphas."""
    at_alphas = accepting_count(config.n, config.level, np.append(_STORED_ALPHAS, config.alpha2))
    ranks = [*at_alphas, config.n]
    if config.bound == "hoeffding":
        below = math.floor(_interpolated(config))
        ranks += [below, below + 1]
    return np.unique(np.minimum(ranks, config.n))


@functools.partial(jax.jit, static_argnames=("n0",))
def _summarise(distances, radius, ranks, *, n0):
    """Fresh samples inside the ball, order statistics of the others, and samples not finite."""
    num_bad = (~jnp.isfinite(distances)).sum()
    return (distances[:n0] <= radius).sum(), jnp.sort(distances[n0:])[ranks - 1], num_bad
