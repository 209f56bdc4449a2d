"""The geometric median of the representation under noise: settings, certificate, computation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.joint.stream import Measured
from ur_jax.distances import ROUNDED_UP, distance
from ur_jax.stats.bounds import accepting_count, order_statistic_rank, rejecting_count
from ur_jax.stats.calibrated import Calibrated
from ur_jax.types import Array, PyTree

GRADIENT = 1e-3
"""What is called a geometric median has a mean of unit vectors to the samples no longer than this;
twice as much is allowed for in float32."""

_SHARES = np.round(np.arange(0.56, 0.97, 0.02), 2)  # that q is chosen from
_STORED = np.unique(np.concatenate([np.linspace(0.5, 1, 129), 1 - np.geomspace(0.5, 1e-5, 96)]))
_MOST_STEPS = 500


@dataclass(frozen=True)
class GeometricMedianConfig(StreamConfig):
    """Settings of the certified geometric median; see `StreamConfig` and `GeometricMedian`."""

    def __post_init__(self):
        super().__post_init__()
        for eps in self.eps_in:
            level = self.level(float(_SHARES[0]), eps)
            alpha = self.alpha2 / len(self.eps_in) * self.share(self.n)
            order_statistic_rank(self.n, level, alpha)

    @property
    def divergence(self) -> str:
        """Of eps_out."""
        return "l2"

    def level(self, share: float, eps_in: float) -> float:
        """Level of the quantile whose ball holds the share within eps_in."""
        return float(stats.norm.cdf(stats.norm.ppf(share) + eps_in / self.sigma))


class GeometricMedianCertificate(NamedTuple):
    """Certificate of one image by the geometric median; arrays are by eps_in [J].

    Attributes:
      eps_out: [J] how far the geometric median of m samples at any input within eps_in is from the
        centre, with 1 - alpha1 - alpha2; infinite where nothing is certified.
      eps_out_population: [J] the same of the population's, with 1 - alpha2.
      abstained: whether nothing is certified at the first eps_in.
      reason: why, or "".
      smoothing_error: distance of the centre from the representation of the clean image.
      share: [J] q, the share of the ball.
      distances: [K] float32, order statistics of the distances from the centre, ascending.
      counts: [K] int64, their ranks among the n.
      n: samples that bound.
      num_drawn: all samples drawn.
      num_bad: samples whose representation is not finite.
    """

    eps_out: np.ndarray
    eps_out_population: np.ndarray
    abstained: bool
    reason: str
    smoothing_error: float
    share: np.ndarray
    distances: np.ndarray
    counts: np.ndarray
    n: int
    num_drawn: int
    num_bad: int


@dataclass(frozen=True)
class GeometricMedian:
    """Certifies g(x) = geometric median of f(x + noise), argmin_z E |f(x + noise) - z|.

    Let z be the centre, fixed by the first stage, R an upper bound on the p(q)-quantile of
    |f(x + noise) - z| at level alpha2, p(q) = Phi(Phi^-1(q) + eps_in / sigma). By Neyman and
    Pearson the ball of radius R about z has probability at least q under noise about every x' with
    |x' - x| <= eps_in. Let y be a point outside of it, at the distance d, and e the direction from
    y to z. A unit vector from y into the ball has <., e> >= sqrt(1 - R^2 / d^2), any other >= -1.
    So the mean of the unit vectors from y to the samples has a component along e of at least
    q sqrt(1 - R^2 / d^2) - (1 - q); at a geometric median that mean is at most the mass at y, which
    the 1 - q has counted already. Hence

        d <= C(q) R,    C(q) = 1 / sqrt(1 - ((1 - q) / q)^2) = q / sqrt(2 q - 1).

    **Guarantee.** *Of the population's smoothed encoder:* with probability at least 1 - alpha2 over
    the noise drawn at x, every geometric median g(x') at every x' within eps_in, all x' and all
    eps_in together, lies within `eps_out_population` of z. *Of what a user computes*, `smoothed`
    with m fresh samples at one x' that does not depend on the noise at x: it lies within `eps_out`
    of z with probability at least 1 - alpha1 - alpha2 over both draws. The share of the m samples
    in the ball is at least q' but for alpha1 (binomial); the iteration ends at a mean of unit
    vectors of length at most 2 GRADIENT, which is added to 1 - q'. f may be unbounded. q is chosen
    on the first stage. Adaptive runs hold at every look (`stats.calibrated`). Distances are rounded
    up for float32, by 2^-10 for up to 2^13 numbers.

    Reference: S. Minsker, "Geometric median and robust estimation in Banach spaces" (2015), lemma
    2.1, there for a finite set.
    """

    config: GeometricMedianConfig

    def anchor(self, representations: Array, fixed: PyTree) -> PyTree:
        """The geometric median z of the first stage, and the distances from it."""
        center, _ = geometric_median(representations)
        away = jnp.sort(distance(representations, jnp.broadcast_to(center, representations.shape)))
        return {"center": center, "away": away}

    def measure(
        self, anchor: PyTree, representations: Array, exists: Array
    ) -> tuple[PyTree, PyTree]:
        """Distances from z."""
        center = jnp.broadcast_to(anchor["center"], representations.shape)
        return distance(representations, center), ()

    def certificate(self, measured: Measured) -> GeometricMedianCertificate:
        """The certificate of n distances."""
        config, n = self.config, measured.n
        away = np.sort(measured.rows)
        ranks = np.maximum(np.ceil(_STORED * n).astype(np.int64), 1)
        shares = np.array([self._share(measured.anchor["away"], eps) for eps in config.eps_in])
        bounds = np.array([
            eps_out_of(
                away, np.arange(1, n + 1), n, eps_in=eps, share=share,
                num_values=measured.num_values, config=config,
            )
            for eps, share in zip(config.eps_in, shares)
        ])  # fmt: skip
        reason = ""
        if measured.num_bad:
            reason = "representations not finite"
        elif not np.isfinite(bounds[0, 0]):
            reason = "too few samples for a bound"
        bounds = np.full_like(bounds, math.inf) if measured.num_bad else bounds
        return GeometricMedianCertificate(
            eps_out=bounds[:, 0],
            eps_out_population=bounds[:, 1],
            abstained=bool(reason),
            reason=reason,
            smoothing_error=float(np.linalg.norm(measured.clean - measured.anchor["center"])),
            share=shares,
            distances=away[ranks - 1],
            counts=ranks,
            n=n,
            num_drawn=measured.num_drawn,
            num_bad=measured.num_bad,
        )

    def is_settled(self, certificate: GeometricMedianCertificate, measured: Measured) -> bool:
        """Whether eps_out at the first eps_in is near what the quantile itself would give."""
        config = self.config
        eps, share = config.eps_in[0], float(certificate.share[0])
        level = config.level(share, eps)
        plain = np.quantile(measured.rows, level) * constant(self._least_share(share), 2 * GRADIENT)
        return bool(certificate.eps_out[0] <= (1 + config.tolerance) * plain)

    def _share(self, away: np.ndarray, eps_in: float) -> float:
        """q of the smallest eps_out that the first stage's distances [n0], ascending, expect."""
        config, n0 = self.config, len(away)
        alpha = config.alpha2 / len(config.eps_in) * config.share(config.n)
        best, least = float(_SHARES[0]), math.inf
        for share in _SHARES:
            level = config.level(float(share), eps_in)
            enough = accepting_count(config.n, level, alpha) <= config.n and (1 - level) * n0 >= 3
            factor = constant(self._least_share(float(share)), 2 * GRADIENT)
            expected = factor * away[min(math.ceil(level * n0), n0) - 1]
            if enough and expected < least:
                best, least = float(share), expected
        return best

    def _least_share(self, share: float) -> float:
        """Share of m samples that the ball of a share holds, but for alpha1."""
        return least_share(share, self.config.m, self.config.alpha1)


def constant(share: float, gradient: float = 0.0) -> float:
    """C = 1 / sqrt(1 - ((1 - q + gradient) / q)^2); infinite where there is none."""
    ratio = (1 - share + gradient) / share if share > 0 else math.inf
    return 1 / math.sqrt(1 - ratio**2) if ratio < 1 else math.inf


def least_share(share: float, m: int, alpha: float) -> float:
    """What the share of m samples with a property of this probability is below with alpha."""
    return (int(rejecting_count(m, share, alpha)) + 1) / m


def eps_out_of(
    distances: np.ndarray, counts: np.ndarray, n: int, *, eps_in: float, share: float,
    num_values: int, config: GeometricMedianConfig,
) -> tuple[float, float]:  # fmt: skip
    """(eps_out, eps_out_population) that order statistics of n distances support.

    With another alpha1 or alpha2 than at sampling this derives them anew from what the table keeps;
    the result is rounded up to the next stored distance, so never smaller than the certificate's.

    Args:
      distances: [K] ascending distances from the centre.
      counts: [K] their ranks among the n.
      n: number of samples.
      eps_in: one of `config.eps_in`.
      share: q.
      num_values: of the image, height * width * channels.
      config: the settings.
    """
    level = config.level(share, eps_in)
    alpha = config.spent(config.alpha2 / len(config.eps_in), num_values, config.n0 + config.n)
    if config.adaptive:
        needed = int(Calibrated(alpha, config.n, config.step, 1.5).accepting(n, level))
    else:
        needed = int(accepting_count(n, level, alpha))
    enough = np.flatnonzero(np.asarray(counts) >= needed)
    if not enough.size:
        return math.inf, math.inf
    radius = float(distances[enough[0]]) * ROUNDED_UP
    alpha1 = config.spent(config.alpha1, num_values, config.m)
    sampled = constant(least_share(share, config.m, alpha1), 2 * GRADIENT)
    return sampled * radius, constant(share) * radius


@jax.jit
def geometric_median(points: Array) -> tuple[Array, Array]:
    """The geometric median of points [n, D] float32, and how long its gradient still is.

    Weiszfeld's iteration from the mean, until the mean of the unit vectors to the points is no
    longer than `GRADIENT`, or 500 steps are done.

    Reference: E. Weiszfeld (1937).
    """

    def look(center):
        away = points - center
        norm = jnp.sqrt(jnp.sum(away**2, axis=1))
        inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)
        pull = (away * inverse[:, None]).mean(axis=0)
        length = jnp.sqrt(jnp.sum(pull**2))
        return pull / jnp.maximum(inverse.mean(), 1e-30), length

    def body(carry):
        center, step, _, number = carry
        center = center + step
        return center, *look(center), number + 1

    start = points.mean(axis=0)
    start = start, *look(start), 0
    go_on = lambda carry: (carry[2] > GRADIENT) & (carry[3] < _MOST_STEPS)
    center, _, length, _ = jax.lax.while_loop(go_on, body, start)
    return center, length
