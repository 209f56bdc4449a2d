"""The mean of the representation under noise: settings, certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy import stats

from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.joint.stream import Measured
from ur_jax.checks import check_number
from ur_jax.distances import ROUNDED_UP
from ur_jax.errors import UserError
from ur_jax.stats.bounded import deviation_of_vectors, kl_upper
from ur_jax.types import Array, PyTree

_BLOCK = 250
_LARGEST_DIMENSION = 8192


@dataclass(frozen=True)
class MeanConfig(StreamConfig):
    """Settings of the certified mean; see `StreamConfig` and `Mean`.

    Attributes:
      ball: B, the representation is clipped to an l2 ball of this radius, > 0, about the middle of
        `clip_ball`. It belongs to the smoothed encoder: the smaller, the tighter the bound and the
        more is clipped. By default that of `clip_ball`.
    """

    ball: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.ball is not None:
            check_number(self, "ball", above=0.0)

    @property
    def divergence(self) -> str:
        """Of eps_out."""
        return "l2"


class MeanCertificate(NamedTuple):
    """Certificate of one image by the mean; arrays are by eps_in [J].

    Attributes:
      eps_out: [J] how far apart the means of m samples at x and at an input within eps_in are, with
        1 - alpha1 - alpha2; infinite where nothing is certified.
      eps_out_population: [J] the same of the population's, with 1 - alpha2.
      abstained: whether nothing is certified at the first eps_in.
      reason: why, or "".
      smoothing_error: distance of the mean from the representation of the clean image.
      ball: B, radius of the ball to which representations are clipped.
      reach: B', how far a clipped representation can be from the first stage's mean c.
      top: largest eigenvalue of the mean of (f - c)(f - c)^T over the n samples, rounded up.
      spread: mean of |f - c|^2 over them, rounded up.
      n: samples that bound.
      num_drawn: all samples drawn.
      num_bad: samples whose representation is not finite.
    """

    eps_out: np.ndarray
    eps_out_population: np.ndarray
    abstained: bool
    reason: str
    smoothing_error: float
    ball: float
    reach: float
    top: float
    spread: float
    n: int
    num_drawn: int
    num_bad: int


@dataclass(frozen=True)
class Mean:
    """Certifies g(x) = E f(x + noise), f clipped to a ball of radius B about a fixed point o.

    Let P and P' be the laws of f under noise about x and x', c any fixed point, u a unit vector.
    Then <g(x') - g(x), u> is the integral of <f - c, u> (dP' / dP - 1) under P, so that

        |g(x') - g(x)| <= sqrt(e^(|x' - x|^2 / sigma^2) - 1) sqrt(max_u E <f - c, u>^2)

    by Cauchy and Schwarz, with the chi^2 divergence of two Gaussians. For the true top direction u,
    which is fixed, <f - c, u>^2 lies in [0, B'^2], and its mean over n samples is at most their
    largest eigenvalue: `kl_upper` bounds its expectation, one-sided, whatever the dimension.

    **Guarantee.** *Of the population's smoothed encoder:* with probability at least 1 - alpha2 over
    the noise drawn at x, |g(x') - g(x)| <= `eps_out_population` for every x' within eps_in, all x'
    and all eps_in together. *Of what a user computes*, `smoothed` of m fresh samples each, at x and
    at one x' that does not depend on the noise at x: the two are within `eps_out` of each other
    with probability at least 1 - alpha1 - alpha2 over all draws. That adds the errors of both means
    (`deviation_of_vectors`, each alpha1 / 3); the second moment at x' is bounded by that at x
    (alpha1 / 3), which noise moves no more than any function in [0,1]. Adaptive runs divide
    alpha2 over their looks, and look at alpha1's bound with the same shares. Clipping is part of
    the function: compare means of one ball only. Useful for eps_in <= sigma: the factor is 1.31
    there and 7.3 at twice sigma. Sums are rounded up for float32: blocks of 250 samples, so
    relative to the spread by at most 2^-15.
    """

    config: MeanConfig

    def anchor(self, representations: Array, fixed: PyTree) -> PyTree:
        """The mean c of the first stage, and the ball, which is `fixed`."""
        return {"c": clipped(representations, *fixed).mean(axis=0), "ball": fixed}

    def measure(
        self, anchor: PyTree, representations: Array, exists: Array
    ) -> tuple[PyTree, PyTree]:
        """Sums of clipped f - c, its square and its products."""
        away = clipped(representations, *anchor["ball"]) - anchor["c"]
        away = jnp.where(exists[:, None], away, 0.0)
        blocks = jnp.pad(away, ((0, -len(away) % _BLOCK), (0, 0)))
        blocks = blocks.reshape(-1, _BLOCK, away.shape[1])

        def add(products, block):
            product = jnp.matmul(block.T, block, precision=jax.lax.Precision.HIGHEST)
            return products + product, None

        start = jnp.zeros((away.shape[1], away.shape[1]), jnp.float32)
        products, _ = jax.lax.scan(add, start, blocks)
        return (), {"products": products, "sum": away.sum(axis=0)}

    def certificate(self, measured: Measured) -> MeanCertificate:
        """The certificate of the sums."""
        anchor, sums, n = measured.anchor, measured.sums, measured.n
        products = sums["products"] / n
        spread = float(np.trace(products)) * (1 + 2.0**-15)
        dimension = len(products)
        [top] = scipy.linalg.eigh(
            products, eigvals_only=True, subset_by_index=[dimension - 1, dimension - 1]
        )
        middle, ball = anchor["ball"]
        center = np.asarray(anchor["c"], np.float64)
        away = float(np.linalg.norm(center - np.asarray(middle, np.float64)))
        found = {
            "ball": float(ball) * ROUNDED_UP,
            "reach": (float(ball) + away) * ROUNDED_UP,
            "top": max(float(top), 0.0) + 2.0**-15 * spread,
            "spread": spread,
        }
        eps_out, population = eps_out_of(
            n=n, num_values=measured.num_values, config=self.config, **found
        )
        reason = "representations not finite" if measured.num_bad else ""
        if reason:
            eps_out, population = np.full_like(eps_out, math.inf), np.full_like(eps_out, math.inf)
        mean = center + sums["sum"] / n
        return MeanCertificate(
            eps_out=eps_out,
            eps_out_population=population,
            abstained=bool(reason),
            reason=reason,
            smoothing_error=float(np.linalg.norm(measured.clean - mean)),
            n=n,
            num_drawn=measured.num_drawn,
            num_bad=measured.num_bad,
            **found,
        )

    def is_settled(self, certificate: MeanCertificate, measured: Measured) -> bool:
        """Whether the population's bound is near what the eigenvalue itself would give."""
        plain = chi(self.config.eps_in[0], self.config.sigma) * math.sqrt(certificate.top)
        return bool(certificate.eps_out_population[0] <= (1 + self.config.tolerance) * plain)


def chi(eps_in: float, sigma: float) -> float:
    """sqrt(e^(eps_in^2 / sigma^2) - 1); infinite where float64 holds none."""
    exponent = (eps_in / sigma) ** 2
    return math.sqrt(math.expm1(exponent)) if exponent < 700 else math.inf


def eps_out_of(
    *, ball: float, reach: float, top: float, spread: float, n: int, num_values: int,
    config: MeanConfig,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(eps_out, eps_out_population) by eps_in [J], from the numbers that the table keeps.

    With another alpha1 or alpha2 than at sampling this derives them anew. Args: see
    `MeanCertificate`; `num_values` of the image, height * width * channels.
    """
    alpha2 = config.spent(config.alpha2, num_values, config.n0 + config.n) * config.share(n)
    alpha1 = config.spent(config.alpha1, num_values, 2 * config.m) / 3
    square = reach**2
    top_bound = square * float(kl_upper(min(top / square, 1.0), n, alpha2))
    spread_share = float(kl_upper(min(spread / square, 1.0), n, alpha1 * config.share(n)))
    here = deviation_of_vectors(2 * ball, square * spread_share, config.m, alpha1)
    sampled, population = [], []
    for eps in config.eps_in:
        factor = chi(eps, config.sigma)
        between = factor * math.sqrt(top_bound) * (1 + 2.0**-20)
        moved = float(stats.norm.cdf(stats.norm.ppf(spread_share) + eps / config.sigma))
        moved = min(moved, spread_share + factor * math.sqrt(spread_share), 1.0)
        there = deviation_of_vectors(2 * ball, min(square * moved, ball**2), config.m, alpha1)
        # No two points of the ball are farther apart than its diameter.
        population.append(min(between, 2 * ball))
        sampled.append(min(between + here + there, 2 * ball))
    return np.array(sampled), np.array(population)


def check_dimension(dimension: int) -> None:
    """Raises UserError for a representation whose matrix of products is too large."""
    if dimension > _LARGEST_DIMENSION:
        raise UserError(
            f"Expected representations of at most {_LARGEST_DIMENSION} numbers for the mean, whose "
            f"matrix of products is kept, got {dimension}; use the geometric median."
        )


def clipped(representations: Array, middle: Array, ball: Array) -> Array:
    """Representations [n, D], those farther than `ball` from the middle [D] moved towards it."""
    away = representations - middle
    length = jnp.sqrt(jnp.sum(away**2, axis=1, keepdims=True))
    return middle + away * jnp.minimum(1.0, ball / jnp.maximum(length, 1e-30))
