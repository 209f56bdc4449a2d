"""The direction nearest to the smoothed representation's: nearest neighbour, or zero-shot class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import stats

from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.joint.cosine import rounding, unit
from ur_jax.certify.joint.stream import Measured
from ur_jax.checks import check_whole
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.metrics.checks import usable_matrix
from ur_jax.stats.betting import mean_lower
from ur_jax.stats.bounded import bernstein_lower
from ur_jax.types import Array, PyTree

_NEAR, _BINS = 16, 256


@struct.dataclass
class Directions:
    """Directions of which one is nearest to a representation's: of images, or of classes' texts.

    Attributes:
      encoder: the encoder.
      bank: [K, D] float32, unit vectors.
    """

    encoder: Encoder
    bank: Array

    @property
    def input_size(self) -> tuple[int, int]:
        """Of the encoder."""
        return self.encoder.input_size

    def __call__(self, images: Array) -> Array:
        """Returns the cosines [B,K] of representations with the directions."""
        return unit(self.encoder(images)) @ self.bank.T


def directions_of(encoder: Encoder, representations: Array | np.ndarray) -> Directions:
    """The directions of representations: of images, by `smoothed` (method "neighbour"), for a
    certified nearest neighbour; of the texts of classes for a certified zero-shot class.

    Args:
      encoder: the encoder.
      representations: [K, D] float32, K >= 2, none of them zero.

    Raises:
      UserError: for fewer than two, not finite ones, zeros, or another dimension.
    """
    usable_matrix("representations", representations)
    if len(representations) < 2 or representations.shape[1] != encoder.dimension:
        raise UserError(
            f"Expected representations [K >= 2, {encoder.dimension}], got shape "
            f"{tuple(representations.shape)}."
        )
    if not np.all(np.any(np.asarray(representations) != 0, axis=1)):
        raise UserError("Expected representations that have a direction, got one of zeros.")
    return Directions(encoder, unit(jnp.asarray(representations)))


@dataclass(frozen=True)
class NeighbourConfig(StreamConfig):
    """Settings of the certified nearest direction; see `StreamConfig` and `Neighbour`.

    `eps_in` names radii to report; the certificate gives the largest.

    Attributes:
      bank: samples of which each image's own direction is computed, where the images themselves are
        what is told apart.
    """

    n: int = 5000
    m: int = 5000
    bank: int = 256

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, "bank")


class NeighbourCertificate(NamedTuple):
    """Certificate of one image by its nearest direction.

    Attributes:
      predicted: which direction, by the first stage; certified unless `abstained`.
      abstained: whether nothing is certified.
      reason: why, or "".
      radius: certified l2 radius of what a user computes of m samples, in pixel units, with
        1 - alpha1 - alpha2; 0 where it abstained.
      radius_population: the same of the population's, with 1 - alpha2.
      lower: the least s_k.
      means: [K] float32, mean of <u, (v - w_k) / |v - w_k|> over the n samples; 1 of v itself.
      variances: [K] float32, their sample variances.
      near: [C] the directions nearest to v in the first stage, whose products are kept in bins.
      lowest: [C] least value of their bins.
      width: [C] of a bin.
      bins: [C 256] int64, samples in each bin, one direction after the other.
      n: samples that bound.
      num_drawn: all samples drawn.
      num_bad: samples whose representation is not finite.
    """

    predicted: int
    abstained: bool
    reason: str
    radius: float
    radius_population: float
    lower: float
    means: np.ndarray
    variances: np.ndarray
    near: np.ndarray
    lowest: np.ndarray
    width: np.ndarray
    bins: np.ndarray
    n: int
    num_drawn: int
    num_bad: int


@dataclass(frozen=True)
class Neighbour:
    """Certifies which of K unit vectors w_k is nearest in direction to g(x) = E f(x + noise) / |f|.

    Let v be the one that the first stage finds, and s_k a lower confidence bound, with alpha2 / (K
    - 1), of E <u, (v - w_k) / |v - w_k|>, u = f / |f|, whose values lie in [-1,1]. As for `Cosine`,
    <g(x + d), v - w_k> > 0 as long as Phi^-1((1 + s_k) / 2) > |d| / sigma. So v stays the nearest
    within

        sigma Phi^-1((1 + min_k s_k) / 2).

    **Guarantee.** *Of the population's smoothed encoder:* with probability at least 1 - alpha2 over
    the noise drawn at x, <g(x'), v> > <g(x'), w_k> for every other k and every x' within
    `radius_population`. *Of what a user computes*, `smoothed` with m fresh samples at one x' within
    `radius` that does not depend on the noise at x: v is its nearest too, but for alpha1 + alpha2
    (each of the K - 1 comparisons with alpha1 / (K - 1), by `least_sample_mean`). The bank is
    fixed, so its vectors are those of an index of images or of texts, which no one perturbs. Two
    equal vectors have nothing between them: then nothing is certified. Adaptive runs divide alpha2
    over their looks. The s_k are by betting for the 16 directions that were nearest in the first
    stage, by `bernstein_lower` for the others, lowered for float32 by 2^-24 (D + 16).
    """

    config: NeighbourConfig

    def anchor(self, representations: Array, fixed: PyTree) -> PyTree:
        """The nearest, and the directions from all others to it; zeros for it and its equals."""
        mean = unit(representations).mean(axis=0)
        top = jnp.argmax(fixed @ mean)
        away = fixed[top] - fixed
        # Closer than float32 tells, a difference has no direction.
        equal = jnp.max(jnp.abs(away), axis=1, keepdims=True) < 1e-6
        between = jnp.where(equal, 0.0, unit(away))
        order = jnp.argsort((between @ mean).at[top].set(jnp.inf))
        return {"top": top, "between": between, "near": order[: min(_NEAR, len(fixed) - 1)]}

    def measure(
        self, anchor: PyTree, representations: Array, exists: Array
    ) -> tuple[PyTree, PyTree]:
        """Products with those near, sums of all and of their squares."""
        high = jax.lax.Precision.HIGHEST
        found = jnp.matmul(unit(representations), anchor["between"].T, precision=high)
        found = jnp.where(exists[:, None], found, 0.0)
        return found[:, anchor["near"]], {
            "sum": found.sum(axis=0),
            "squares": (found**2).sum(axis=0),
        }

    def certificate(self, measured: Measured) -> NeighbourCertificate:
        """The certificate of the sums."""
        n, top = measured.n, int(measured.anchor["top"])
        means = measured.sums["sum"] / n
        variances = np.maximum(measured.sums["squares"] / n - means**2, 0.0) * n / max(n - 1, 1)
        # A float32 sum of `step` values in [-1,1] is wrong by less than 2^-24 step of their number.
        variances = variances + self.config.step * 2.0**-22
        means[top], variances[top] = 1.0, 0.0
        means, variances = means.astype(np.float32), np.nextafter(variances.astype(np.float32), 9)
        dimension = measured.anchor["between"].shape[1]
        near = np.asarray(measured.anchor["near"])
        kept = [
            _binned(np.clip(values, -1.0, 1.0)) for values in measured.rows.T.astype(np.float64)
        ]
        lowest, width, bins = (np.array(each) for each in zip(*kept))
        lower = lower_of(
            means, variances, top, n, dimension, measured.num_values, self.config,
            near=near, lowest=lowest, width=width, bins=bins.ravel(),
        )  # fmt: skip
        radius, population = radius_of(lower, len(means), measured.num_values, self.config)
        reason = "no direction is clearly the nearest" if radius <= 0 else ""
        if measured.num_bad:
            radius, population, reason = 0.0, 0.0, "representations not finite"
        return NeighbourCertificate(
            predicted=top,
            abstained=bool(reason),
            reason=reason,
            radius=radius,
            radius_population=population,
            lower=lower,
            means=means,
            variances=variances,
            near=near,
            lowest=lowest,
            width=width,
            bins=bins.ravel(),
            n=n,
            num_drawn=measured.num_drawn,
            num_bad=measured.num_bad,
        )

    def is_settled(self, certificate: NeighbourCertificate, measured: Measured) -> bool:
        """Whether the radius is near what the means themselves would give."""
        config = self.config
        least = float(np.delete(certificate.means, certificate.predicted).min())
        hoped = config.sigma * float(stats.norm.ppf((1 + min(least, 1 - 1e-12)) / 2))
        return bool(hoped - certificate.radius_population <= config.tolerance * config.sigma)


def lower_of(
    means: np.ndarray, variances: np.ndarray, top: int, n: int, dimension: int, num_values: int,
    config: NeighbourConfig, *, near: np.ndarray, lowest: np.ndarray, width: np.ndarray,
    bins: np.ndarray,
) -> float:  # fmt: skip
    """The least s_k from what the table keeps, also at another alpha2 than at sampling."""
    alpha = config.spent(config.alpha2, num_values, config.n0 + config.n) / (len(means) - 1)
    slack = rounding(dimension) + (config.step + 8) * 2.0**-24
    lower = bernstein_lower(
        means.astype(np.float64), variances.astype(np.float64), n, alpha * config.share(n)
    )
    lower[top] = 1.0
    for k, start, step, counts in zip(near, lowest, width, bins.reshape(len(near), _BINS)):
        values = np.clip((1 + start + step * np.arange(_BINS)) / 2, 0.0, 1.0)
        lower[k] = 2 * mean_lower(values, alpha, counts) - 1  # which holds at every look
    return max(float(lower.min()) - slack, -1.0)


def _binned(values: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(least value, width, how many are in each bin)."""
    lowest, width = float(values.min()), max(float(np.ptp(values)) / _BINS, 1e-12)
    places = np.clip(np.floor((values - lowest) / width), 0, _BINS - 1).astype(np.int64)
    return lowest, width, np.bincount(places, minlength=_BINS)


def radius_of(
    lower: float, num_directions: int, num_values: int, config: NeighbourConfig
) -> tuple[float, float]:
    """(radius, radius_population) of the least s_k."""
    place = float(stats.norm.ppf((1 + min(lower, 1 - 1e-12)) / 2)) if lower > -1 else -math.inf
    alpha1 = config.spent(config.alpha1, num_values, config.m) / (num_directions - 1)
    needed = _probability_that_shows(config.m, alpha1)
    sampled = config.sigma * (place - float(stats.norm.ppf(needed)))
    return max(sampled, 0.0), max(config.sigma * place, 0.0)


def _probability_that_shows(m: int, alpha: float) -> float:
    """Mean in [0,1] from which m values have a mean above 1/2, but for alpha: kl(1/2, p) m = ln."""
    # kl(1/2, p) = -ln(4 p (1 - p)) / 2
    product = math.exp(-2 * math.log(1 / alpha) / m) / 4
    return 0.5 + math.sqrt(max(0.25 - product, 0.0))
