"""The certificate of center smoothing, and what follows from the counts that it keeps."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ur_jax.certify.center.config import CenterConfig
from ur_jax.certify.enclosing import Center
from ur_jax.checks import check_type
from ur_jax.errors import UserError
from ur_jax.stats.bounds import (
    ConfidenceSequence,
    accepting_count,
    check_counts,
)
from ur_jax.stats.sequences import confidence_sequence

_VANISHES = 1e-18  # the square of a smaller distance is none in float32


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


class FreshSamples(NamedTuple):
    """What the samples after the center's say.

    Attributes:
      eps_out: the bound; infinite if there is none.
      checked: whether the ball about the center holds enough of them.
      num_in_ball, num_checked, distances, counts, n: see `CenterCertificate`.
      num_drawn: all samples drawn, the center's included.
      num_bad: those of these samples that are not finite.
    """

    eps_out: float
    checked: bool
    num_in_ball: int
    num_checked: int
    distances: np.ndarray
    counts: np.ndarray
    n: int
    num_drawn: int
    num_bad: int


def make_certificate(center: Center, fresh: FreshSamples) -> CenterCertificate:
    """The certificate of a center, with the reason for an abstention."""
    num_bad, reason = int(center.num_bad + fresh.num_bad), ""
    if num_bad:
        reason = "representations not finite"
    elif not fresh.checked:
        reason = "the ball about the center holds too few fresh samples"
    elif fresh.eps_out < _VANISHES:
        reason = "all samples have one representation: collapsed, or too small for float32"
    elif math.isinf(fresh.eps_out):
        reason = "no tested threshold is certified"
    return CenterCertificate(
        eps_out=math.inf if reason else fresh.eps_out,
        abstained=bool(reason),
        reason=reason,
        smoothing_error=float(center.smoothing_error),
        radius=float(center.radius),
        num_in_ball=fresh.num_in_ball,
        num_checked=fresh.num_checked,
        distances=np.asarray(fresh.distances, np.float32),
        counts=np.asarray(fresh.counts, np.int64),
        n=fresh.n,
        num_drawn=fresh.num_drawn,
        num_bad=num_bad,
    )


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

    Raises:
      UserError: for counts that are none of n samples, distances that do not ascend, and
        "hoeffding".
    """
    check_type("config", config, CenterConfig)
    distances = np.asarray(distances)
    if config.bound == "hoeffding":
        raise UserError(
            "Expected another bound than hoeffding, which is interpolated; use 'exact'."
        )
    check_counts(n, counts)
    if distances.ndim != 1 or distances.shape != np.shape(counts):
        raise UserError(
            f"Expected a count for each distance [K], got {np.shape(counts)}, {distances.shape}."
        )
    if not np.issubdtype(distances.dtype, np.floating) or not np.all(np.diff(distances) >= 0):
        raise UserError("Expected ascending distances of floating point, without NaN.")
    return bound_of(distances, counts, n, config)


def bound_of(distances: np.ndarray, counts: np.ndarray, n: int, config: CenterConfig) -> float:
    """`eps_out_from_counts` of what was just sampled: NaN, of an image that abstains, included."""
    if config.adaptive:
        needed = int(sequence(config, config.alpha2).accepting(n, config.level))
    else:
        needed = int(accepting_count(n, config.level, config.alpha2))
    enough = np.flatnonzero(np.asarray(counts) >= needed)
    return config.factor * float(distances[enough[0]]) if enough.size else math.inf


def sequence(config: CenterConfig, alpha: float) -> ConfidenceSequence:
    """The confidence sequence of an adaptive configuration."""
    return confidence_sequence(config.bound, alpha=alpha, n_max=config.n, step=config.step)
