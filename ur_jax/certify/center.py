"""Center smoothing (Kumar and Goldstein 2021): a certified divergence radius for any encoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax.certify.configs import CenterConfig
from ur_jax.certify.enclosing import enclose
from ur_jax.certify.sampling import Rows, sample_outputs, stream
from ur_jax.devices import data_mesh, replicate
from ur_jax.distances import distance
from ur_jax.encoders.base import Encoder
from ur_jax.stats.bounds import (
    accepting_count,
    clopper_pearson_lower,
    confidence_sequence,
    hoeffding_level,
)
from ur_jax.stats.sequences import Table, level_table, looking_times
from ur_jax.types import Array, Key

_GRID_BELOW, _GRID_SIZE = 16, 64
_STORED_ALPHAS = np.geomspace(0.5, 1e-9, 28)


class CenterCertificate(NamedTuple):
    """Certificate of one image by center smoothing.

    Attributes:
      eps_out: certified radius in the divergence; infinite where it abstained.
      abstained: whether nothing is certified.
      reason: why, or "".
      smoothing_error: divergence of the center from the representation of the clean image.
      radius: radius of the ball about the center that holds half of the first n0 samples.
      num_in_ball: fresh samples inside that ball.
      num_checked: fresh samples compared with it.
      distances: [K] float32, ascending distances from the center: order statistics about the bound,
        or the thresholds that were tested.
      counts: [K] int64, how many of the n samples are at most that far away: ranks, or counts.
      n: samples that bound the quantile.
      num_drawn: all samples drawn.
      num_bad: samples whose representation is not finite.
    """

    eps_out: float
    abstained: bool
    reason: str
    smoothing_error: float
    radius: float
    num_in_ball: int
    num_checked: int
    distances: np.ndarray
    counts: np.ndarray
    n: int
    num_drawn: int
    num_bad: int


def center_smoothing(
    encoder: Encoder,
    images: Iterable[Array],
    key: Key,
    *,
    config: CenterConfig,
    indices: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int], Any] = lambda num_samples: None,
) -> Iterator[tuple[int, CenterCertificate]]:
    """Certifies how far the smoothed representation can move under inputs within eps_in.

        eps_out = 3 * bound on the p-quantile of d(z, f(x + noise)),
        p = Phi(Phi^-1(1/2 + delta) + eps_in / sigma)

    where the center z is the sample of f(x + noise) whose median distance to the others is
    smallest: its ball has at most twice the smallest radius (hence 3 = 1 + 2).

    **Guarantee.** *Per stage:* given z, with probability at least 1 - alpha2 over the fresh noise
    drawn at x, the ball about z of radius eps_out / 3 has probability at least 1/2 + delta under
    noise about every x' within eps_in of x, all x' together. Then eps_out covers every center with
    the defining property at x': a ball of at most twice the smallest radius for 1/2 + delta that
    holds 1/2 - delta. *Joint:* this procedure, run with its own noise at one x' that does not
    depend on the noise at x, finds such a center or abstains with probability at least 1 - alpha1.
    So with probability at least 1 - alpha1 - alpha2 over both draws, it abstains at x' or its
    center lies within eps_out of z. Where the check at x fails, it abstains there. For the adaptive
    bounds the same holds whatever the number of thresholds and whenever the test stopped:
    thresholds are nested, so a false one implies that one and the same sequence is crossed.
    Nothing is joint over images.

    "hoeffding" interpolates between order statistics as the published code does; its level is so
    far above the exact one that the lower neighbour is a valid bound too.

    Args:
      encoder: the encoder f, with images [B,H,W,3] in [0,1] to representations [B,D].
      images: images [H,W,3] float32 in [0,1], or one array [N,H,W,3]; taken as places free up.
      key: typed key of the run; noise depends on it, the index and the sample alone.
      config: the settings.
      indices: index of each image, which keys its noise; 0, 1, ... by default.
      mesh: devices to use; all local ones by default.
      batch_size: samples per device and forward pass; see `memory.fit_batch_size`.
      on_progress: called every few seconds with the number of samples since the last call.

    Yields:
      (index, certificate); in the order of the images for the fixed bounds, as they are decided for
      the adaptive ones.

    Reference: Kumar and Goldstein (2021), Algorithms 1 and 2, Theorems 1 and 2; Voracek (2024).
    """
    mesh = mesh or data_mesh()
    encoder, key = replicate(mesh, (encoder, key))
    indices = iter(indices) if indices is not None else iter(range(np.iinfo(np.int32).max))
    first_stage = functools.partial(
        _find_center, encoder, key, config=config, mesh=mesh, batch_size=batch_size
    )

    def centered():
        for image, index in zip(images, indices):  # no index is taken without an image
            image = replicate(mesh, jnp.asarray(image, jnp.float32))
            yield index, image, first_stage(image, index)
            on_progress(config.n0)

    run = _adaptive if config.adaptive else _fixed
    yield from run(encoder, centered(), key, config, mesh, batch_size, on_progress)


def eps_out_from_counts(
    distances: np.ndarray, counts: np.ndarray, n: int, *, config: CenterConfig
) -> float:
    """Smallest certified eps_out that the stored counts support.

    With another `config.alpha2` than at sampling this derives the bound anew, without sampling; the
    result is rounded up to the next stored distance. For the adaptive bounds the last counts alone
    are used, so that at the same alpha2 the result can be larger than the certificate's `eps_out`,
    which remembers thresholds that were accepted earlier; it is never smaller.

    Args:
      distances: [K] ascending distances from the center.
      counts: [K] how many of n samples are at most that far away.
      n: number of samples.
      config: the settings; any bound but "hoeffding".

    Returns:
      eps_out; infinite if no stored distance is a bound.
    """
    if config.adaptive:
        needed = int(_sequence(config, config.alpha2).accepting(n, config.level))
    else:
        needed = int(accepting_count(n, config.level, config.alpha2))
    enough = np.flatnonzero(np.asarray(counts) >= needed)
    return config.factor * float(distances[enough[0]]) if enough.size else math.inf


def _represent(encoder, images):
    """Representations; a function object that stays the same."""
    return encoder(images)


@dataclass(frozen=True)
class _DistanceFromCenter:
    """Distances of representations from a center; equal objects share a compilation."""

    divergence: str

    def __call__(self, operand, images):
        encoder, center = operand
        representations = encoder(images)
        return distance(
            representations,
            jnp.broadcast_to(center, representations.shape),
            divergence=self.divergence,
        )


def _find_center(encoder, key, image, index, *, config, mesh, batch_size):
    """First stage: the center, its radius and the estimate of the quantile."""
    representations = sample_outputs(
        _represent,
        encoder,
        image,
        key,
        jnp.int32(index),
        jnp.int32(0),
        n=config.n0,
        sigma=config.sigma,
        clip=config.clip,
        mesh=mesh,
        batch_size=batch_size,
    )
    rank = jnp.int32(min(math.ceil(config.level * config.n0), config.n0))
    return enclose(encoder, image, representations, rank, divergence=config.divergence, mesh=mesh)


def _fixed(encoder, centered, key, config, mesh, batch_size, on_progress):
    """Checks and bounds with fixed numbers of fresh samples, one image after the other."""
    ranks = _stored_ranks(config)

    def start(index, image, first):
        distances = sample_outputs(
            _DistanceFromCenter(config.divergence),
            (encoder, first.center),
            image,
            key,
            jnp.int32(index),
            jnp.int32(config.n0),
            n=config.n0 + config.n,
            sigma=config.sigma,
            clip=config.clip,
            mesh=mesh,
            batch_size=batch_size,
        )
        return index, first, _summarise(distances, first.radius, ranks, n0=config.n0)

    def finish(index, first, summary):
        first, (num_in_ball, statistics, num_bad) = jax.device_get((first, summary))
        on_progress(config.n0 + config.n)
        if config.bound == "hoeffding":
            position = hoeffding_level(config.n, config.level, config.alpha2) * (config.n - 1)
            quantile = np.interp(position + 1, ranks, statistics.astype(np.float64))
            eps_out = config.factor * float(quantile)
            least = (0.5 - config.delta + _hoeffding_margin(config)) * config.n0
            checked = num_in_ball >= least
        else:
            eps_out = eps_out_from_counts(statistics, ranks, config.n, config=config)
            lower = clopper_pearson_lower(num_in_ball, config.n0, config.alpha1 / 2)
            checked = lower >= 0.5 - config.delta
        return index, _certificate(
            config,
            first,
            eps_out if checked else math.inf,
            checked,
            int(num_in_ball),
            config.n0,
            statistics,
            ranks,
            config.n,
            2 * config.n0 + config.n,
            int(first.num_bad + num_bad),
        )

    # One image is always queued behind the one that is read, so that the device does not wait.
    running = None
    for job in centered:
        queued = start(*job)
        if running is not None:
            yield finish(*running)
        running = queued
    if running is not None:
        yield finish(*running)


def _hoeffding_margin(config):
    """Allowance for the fraction of fresh samples inside the ball, by Hoeffding."""
    return math.sqrt(math.log(2 / config.alpha1) / (2 * config.n0))


def _stored_ranks(config):
    """Ranks of the order statistics to keep: about the bound, and for other alphas."""
    at_alphas = accepting_count(config.n, config.level, np.append(_STORED_ALPHAS, config.alpha2))
    ranks = [*at_alphas, config.n]
    if config.bound == "hoeffding":
        below = math.floor(hoeffding_level(config.n, config.level, config.alpha2) * (config.n - 1))
        ranks += [below + 1, below + 2]
    return np.unique(np.minimum(ranks, config.n))


@functools.partial(jax.jit, static_argnames=("n0",))
def _summarise(distances, radius, ranks, *, n0):
    """Fresh samples inside the ball, order statistics of the others, and samples not finite."""
    num_bad = (~jnp.isfinite(distances)).sum()
    return (distances[:n0] <= radius).sum(), jnp.sort(distances[n0:])[ranks - 1], num_bad


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


def _sequence(config, alpha):
    """The confidence sequence of an adaptive configuration."""
    return confidence_sequence(config.bound, alpha=alpha, n_max=config.n, step=config.step)


def _adaptive(encoder, centered, key, config, mesh, batch_size, on_progress):
    """Tests thresholds sequentially on one stream of fresh samples, many images in flight."""
    times = looking_times(config.n, config.step)
    tables = [
        level_table(_sequence(config, config.alpha1 / 2), times, np.array([0.5 - config.delta])),
        level_table(_sequence(config, config.alpha2), times, np.array([config.level])),
    ]
    values = np.unique(np.asarray(config.eps_out_values, np.float64))
    num_values = len(values) or _GRID_SIZE
    method = _Thresholds(
        sigma=config.sigma,
        clip=config.clip,
        first=config.n0,
        n=config.n,
        step=config.step,
        num_events=1 + num_values,
        divergence=config.divergence,
        gap=1 if len(values) else 2,
    )

    def jobs():
        for index, image, first in centered:
            if len(values):
                thresholds = _rounded_down(values / config.factor)
            else:
                # Two steps of the grid are the tolerance.
                exponents = np.arange(_GRID_SIZE, dtype=np.float32) - _GRID_BELOW
                thresholds = first.estimate * (1 + config.tolerance) ** (exponents / 2)
            extra = {
                "center": first.center,
                "thresholds": jnp.concatenate([first.radius[None], jnp.asarray(thresholds)]),
                "first": first._replace(center=None),
            }
            yield index, image, extra

    outcomes = stream(
        encoder,
        jobs(),
        key,
        method=method,
        tables=Table(*(np.concatenate(parts, axis=1) for parts in zip(*tables))),
        answer=np.zeros(method.num_events, np.int8),
        mesh=mesh,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    for outcome in outcomes:
        n = min(outcome.pieces * config.step, config.n)
        thresholds, first = outcome.extra["thresholds"], outcome.extra["first"]
        certified = np.flatnonzero(outcome.answer[1:] > 0)
        eps_out = math.inf
        if certified.size:
            smallest = certified[0]
            eps_out = config.factor * float(thresholds[1 + smallest])
            eps_out = float(values[smallest]) if len(values) else eps_out
        yield (
            outcome.index,
            _certificate(
                config,
                first,
                eps_out,
                outcome.answer[0] > 0,
                int(outcome.counts[0]),
                n,
                thresholds[1:],
                outcome.counts[1:].astype(np.int64),
                n,
                config.n0 + n,
                int(first.num_bad + outcome.num_bad),
            ),
        )


def _rounded_down(values):
    """Float32 values that are at most the float64 ones."""
    nearest = values.astype(np.float32)
    return np.where(nearest > values, np.nextafter(nearest, np.float32(0)), nearest)


def _certificate(
    config,
    first,
    eps_out,
    checked,
    num_in_ball,
    num_checked,
    distances,
    counts,
    n,
    num_drawn,
    num_bad,
):
    """The certificate, with the reason for an abstention."""
    reason = ""
    if num_bad:
        reason = "representations not finite"
    elif not checked:
        reason = "the ball about the center holds too few fresh samples"
    elif math.isinf(eps_out):
        reason = "no tested threshold is certified"
    return CenterCertificate(
        eps_out=math.inf if reason else eps_out,
        abstained=bool(reason),
        reason=reason,
        smoothing_error=float(first.smoothing_error),
        radius=float(first.radius),
        num_in_ball=num_in_ball,
        num_checked=num_checked,
        distances=np.asarray(distances, np.float32),
        counts=np.asarray(counts, np.int64),
        n=n,
        num_drawn=num_drawn,
        num_bad=num_bad,
    )
