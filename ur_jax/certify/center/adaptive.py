"""Center smoothing by sequential tests of thresholds, on one stream of fresh samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax.certify.center.certificate import (
    CenterCertificate,
    FreshSamples,
    make_certificate,
    sequence,
)
from ur_jax.certify.center.config import CenterConfig
from ur_jax.certify.enclosing import Center
from ur_jax.certify.sequential import Outcome, Rows, stream
from ur_jax.distances import distance
from ur_jax.encoders.base import Encoder
from ur_jax.stats.sequences import Table, level_table, looking_times
from ur_jax.types import Array, Key

_GRID_BELOW, _GRID_SIZE = 16, 64


def adaptive(
    encoder: Encoder,
    centered: Iterable[tuple[int, Array, Center]],
    key: Key,
    config: CenterConfig,
    mesh: Mesh,
    batch_size: int,
    on_progress: Callable[[int], Any],
) -> Iterator[tuple[int, CenterCertificate]]:
    """Tests thresholds sequentially, many images in flight; see `center_smoothing`.

    Args:
      centered: (index, image, center) of each image.
      (the others): of `center_smoothing`.
    """
    values = np.unique(np.asarray(config.eps_out_values, np.float64))
    method = _Thresholds(
        sigma=config.sigma,
        clip=config.clip,
        noise=config.noise,
        first=config.n0,
        n=config.n,
        step=config.step,
        num_events=1 + (len(values) or _GRID_SIZE),
        divergence=config.divergence,
        gap=1 if len(values) else 2,
    )

    def jobs():
        for index, image, center in centered:
            thresholds = _thresholds(config, values, center)
            extra = {
                "center": center.center,
                "thresholds": jnp.concatenate([center.radius[None], jnp.asarray(thresholds)]),
                "first": center._replace(center=None),
            }
            yield index, image, extra

    outcomes = stream(
        encoder,
        jobs(),
        key,
        method=method,
        tables=_tables(config),
        answer=np.zeros(method.num_events, np.int8),
        mesh=mesh,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    for outcome in outcomes:
        yield outcome.index, _certificate(outcome, config, values)


@dataclass(frozen=True)
class _Thresholds:
    """Counts distances within the ball's radius and within each threshold, and tests both."""

    sigma: float
    clip: bool
    first: int
    n: int
    step: int
    num_events: int
    divergence: str
    gap: int
    n0: int = 0
    noise: str = "float"

    def observe(self, model, extra, images):
        """Event 0: inside the ball; event k: within threshold k."""
        representations = model(images)
        finite = jnp.isfinite(representations).all(axis=1)
        away = distance(representations, extra["center"], divergence=self.divergence)
        return (away[:, None] <= extra["thresholds"]).astype(jnp.int32), finite

    def decide(self, tables: Table, rows: Rows) -> Rows:
        """Stops if the ball is refuted, or verified with the certified threshold narrowed down."""
        time = jnp.maximum(rows.pieces - 1, 0)
        column = jnp.minimum(jnp.arange(self.num_events), 1)
        yes = rows.counts >= tables.accept[time][:, column]
        no = rows.counts <= tables.reject[time][:, column]
        news = jnp.where(yes, 1, jnp.where(no, -1, 0)).astype(jnp.int8)
        verdicts = jnp.where(rows.answer == 0, news, rows.answer)
        ball, values = verdicts[:, 0], verdicts[:, 1:]
        places = jnp.arange(self.num_events - 1)
        smallest_yes = jnp.where(values > 0, places, self.num_events - 1).min(axis=1)
        largest_no = jnp.where(values < 0, places, -1).max(axis=1)
        narrow = smallest_yes - largest_no <= self.gap
        return rows._replace(answer=verdicts, done=rows.done | (ball < 0) | ((ball > 0) & narrow))


def _thresholds(config: CenterConfig, values: np.ndarray, center: Center) -> Array | np.ndarray:
    """The distances from the center to test, ascending."""
    if len(values):
        return _rounded_down(values / config.factor)
    # Two steps of the grid are the tolerance.
    exponents = np.arange(_GRID_SIZE, dtype=np.float32) - _GRID_BELOW
    return center.estimate * (1 + config.tolerance) ** (exponents / 2)


def _rounded_down(values: np.ndarray) -> np.ndarray:
    """Float32 values that are at most the float64 ones."""
    nearest = values.astype(np.float32)
    return np.where(nearest > values, np.nextafter(nearest, np.float32(0)), nearest)


def _tables(config: CenterConfig) -> Table:
    """When the ball (column 0) and a threshold (column 1) are decided."""
    times = looking_times(config.n, config.step)
    ball = level_table(sequence(config, config.alpha1 / 2), times, np.array([0.5 - config.delta]))
    others = level_table(sequence(config, config.alpha2), times, np.array([config.level]))
    return Table(*(np.concatenate(columns, axis=1) for columns in zip(ball, others)))


def _certificate(outcome: Outcome, config: CenterConfig, values: np.ndarray) -> CenterCertificate:
    """The certificate of a decided image."""
    n = min(outcome.pieces * config.step, config.n)
    thresholds = outcome.extra["thresholds"]
    certified = np.flatnonzero(outcome.answer[1:] > 0)
    eps_out = math.inf
    if certified.size:
        smallest = certified[0]
        eps_out = config.factor * float(thresholds[1 + smallest])
        eps_out = float(values[smallest]) if len(values) else eps_out
    fresh = FreshSamples(
        eps_out=eps_out,
        checked=bool(outcome.answer[0] > 0),
        num_in_ball=int(outcome.counts[0]),
        num_checked=n,
        distances=thresholds[1:],
        counts=outcome.counts[1:],
        n=n,
        num_drawn=config.n0 + n,
        num_bad=outcome.num_bad,
    )
    return make_certificate(outcome.extra["first"], fresh)
