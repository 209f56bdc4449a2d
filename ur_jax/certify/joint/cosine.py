"""The direction of the mean representation under noise: settings, certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.joint.stream import Measured
from ur_jax.stats.betting import mean_lower
from ur_jax.stats.bounded import least_sample_mean
from ur_jax.types import Array, PyTree

_BINS = 1024


@dataclass(frozen=True)
class CosineConfig(StreamConfig):
    """Settings of the certified cosine; see `StreamConfig` and `Cosine`."""

    n: int = 5000
    m: int = 5000

    @property
    def divergence(self) -> str:
        """Of eps_out, 1 - cosine."""
        return "cosine"


class CosineCertificate(NamedTuple):
    """Certificate of one image by the cosine; arrays are by eps_in [J].

    Attributes:
      cosine: [J] least cosine of the direction of m samples at an input within eps_in with v, with
        1 - alpha1 - alpha2; -1 where nothing is certified.
      cosine_population: [J] the same of the population's, with 1 - alpha2.
      eps_out: [J] 1 - cosine, the certified cosine distance; 2 where nothing is certified.
      abstained: whether nothing is certified at the first eps_in.
      reason: why, or "".
      smoothing_error: cosine distance of v from the representation of the clean image.
      lower: s, lower confidence bound of E <f, v> at x.
      lowest: least value of the stored bins.
      width: of a bin.
      bins: [1024] int64, samples whose <f, v> is in each bin.
      n: samples that bound.
      num_drawn: all samples drawn.
      num_bad: samples whose representation is not finite.
    """

    cosine: np.ndarray
    cosine_population: np.ndarray
    eps_out: np.ndarray
    abstained: bool
    reason: str
    smoothing_error: float
    lower: float
    lowest: float
    width: float
    bins: np.ndarray
    n: int
    num_drawn: int
    num_bad: int


@dataclass(frozen=True)
class Cosine:
    """Certifies the direction of g(x) = E u(x + noise), u = f / |f|, by its cosine with a vector v.

    v is the direction of the first stage's mean, fixed before the second. (1 + <u, v>) / 2 lies in
    [0,1], so that Phi^-1 of its expectation under noise moves by at most r / sigma over a distance
    r. With s a lower confidence bound of E <u(x + noise), v>, by betting, for every |d| <= r

        <g(x + d), v> >= 2 Phi(Phi^-1((1 + s) / 2) - r / sigma) - 1,

    and the cosine of g(x + d) with v is at least that where it is >= 0, since |g| <= 1.

    **Guarantee.** *Of the population's smoothed encoder:* with probability at least 1 - alpha2 over
    the noise drawn at x, the cosine of g(x') and v is at least `cosine_population` for every x'
    within eps_in, all x' and all radii together, so the whole curve over radii holds at once. *Of
    what a user computes*, `smoothed` with m fresh samples at one x' that does not depend on the
    noise at x: its direction has a cosine with v of at least `cosine`, but for alpha1 + alpha2
    (`least_sample_mean`). Betting holds at every look of an adaptive run. A representation of zero
    has no direction: it counts as <u, v> = 0. Products are lowered for float32, by 2^-24 (D + 16).

    Reference: H. Salman et al., "Provably robust deep learning via adversarially trained smoothed
    classifiers" (2019), lemma 2, for functions into [0,1].
    """

    config: CosineConfig

    def anchor(self, representations: Array, fixed: PyTree) -> PyTree:
        """v."""
        mean = unit(representations).mean(axis=0)
        return unit(mean[None])[0]

    def measure(
        self, anchor: PyTree, representations: Array, exists: Array
    ) -> tuple[PyTree, PyTree]:
        """<u, v>."""
        return jnp.sum(unit(representations) * anchor, axis=1), ()

    def certificate(self, measured: Measured) -> CosineCertificate:
        """The certificate of n cosines."""
        v = np.asarray(measured.anchor, np.float64)
        values = np.clip(measured.rows.astype(np.float64) - rounding(len(v)), -1.0, 1.0)
        lowest, width = float(values.min()), max(float(np.ptp(values)) / _BINS, 1e-12)
        places = np.clip(np.floor((values - lowest) / width), 0, _BINS - 1).astype(np.int64)
        bins = np.bincount(places, minlength=_BINS)
        lower = lower_of(lowest, width, bins, measured.num_values, self.config)
        sampled, population = cosine_of(lower, measured.num_values, self.config)
        reason = ""
        if measured.num_bad:
            reason = "representations not finite"
        elif sampled[0] < 0:
            reason = "no direction within the radius"
        if measured.num_bad:
            sampled, population = np.full_like(sampled, -1.0), np.full_like(sampled, -1.0)
        length = np.linalg.norm(measured.clean)
        return CosineCertificate(
            cosine=sampled,
            cosine_population=population,
            eps_out=1.0 - sampled,
            abstained=bool(reason),
            reason=reason,
            smoothing_error=1.0 - float(measured.clean @ v / length) if length > 0 else 1.0,
            lower=lower,
            lowest=lowest,
            width=width,
            bins=bins,
            n=measured.n,
            num_drawn=measured.num_drawn,
            num_bad=measured.num_bad,
        )

    def is_settled(self, certificate: CosineCertificate, measured: Measured) -> bool:
        """Whether 1 - cosine is near what the mean itself would give."""
        mean = float(np.mean(measured.rows))
        plain = 1.0 - (2 * self.config.moved((1 + mean) / 2, self.config.eps_in[0]) - 1)
        at_most = (1 + self.config.tolerance) * plain
        return bool(1.0 - certificate.cosine_population[0] <= at_most)


def lower_of(
    lowest: float, width: float, bins: np.ndarray, num_values: int, config: CosineConfig
) -> float:
    """s from the bins that the table keeps, also at another alpha2 than at sampling."""
    values = lowest + width * np.arange(len(bins))
    alpha = config.spent(config.alpha2, num_values, config.n0 + config.n)
    unit_values = np.clip((1 + values) / 2, 0.0, 1.0)  # a value is lowered to its bin's start
    return 2 * mean_lower(unit_values, alpha, bins) - 1


def cosine_of(
    lower: float, num_values: int, config: CosineConfig, radii: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, cosine_population) at radii, by default eps_in; -1 where there is none.

    Args:
      lower: s.
      num_values: of the image, height * width * channels.
      config: the settings.
      radii: l2, in pixel units, [J].
    """
    radii = np.asarray(config.eps_in if radii is None else radii)
    probability = config.moved((1 + lower) / 2, radii)
    alpha1 = config.spent(config.alpha1, num_values, config.m)
    both = []
    for p in (least_sample_mean(probability, config.m, alpha1), probability):
        cosine = 2 * p - 1
        both.append(np.where(cosine >= 0, cosine, -1.0))
    return both[0], both[1]


def unit(representations: Array) -> Array:
    """Rows [n, D] over their norms; 0 of a row of zeros."""
    largest = jnp.max(jnp.abs(representations), axis=1, keepdims=True)
    scaled = representations / jnp.where(largest > 0, largest, 1.0)
    length = jnp.sqrt(jnp.sum(scaled**2, axis=1, keepdims=True))
    return scaled / jnp.where(length > 0, length, 1.0)


def rounding(dimension: int) -> float:
    """What a float32 product of two unit vectors of this dimension is wrong by, at most."""
    return (dimension + 16) * 2.0**-24
