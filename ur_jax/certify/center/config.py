"""Settings of center smoothing, refused before any sampling where they can never succeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scipy import stats

from ur_jax.certify.enclosing import hoeffding_n0, smallest_n0
from ur_jax.certify.inputs import check_each, check_name, check_samples
from ur_jax.certify.noise import NOISES
from ur_jax.checks import check_flag, check_number, check_whole
from ur_jax.distances import ROUNDED_UP
from ur_jax.errors import UserError
from ur_jax.stats.bounds import (
    check_interpolated,
    check_level,
    hoeffding_level,
    order_statistic_rank,
)
from ur_jax.stats.sequences import SEQUENCES

BOUNDS = ("exact", "hoeffding", "union", "betting", "calibrated")
METRICS = ("l1", "l2", "linf")
APPROXIMATION = 2.0
"""The enclosing ball found has at most this many times the smallest radius."""


@dataclass(frozen=True)
class CenterConfig:
    """Settings of center smoothing; the defaults are the paper's, with the exact bound.

    Attributes:
      sigma: standard deviation of the noise in pixel units, > 0.
      eps_in: l2 radius of the inputs that are covered, in pixel units, > 0.
      n0: samples that give the center; as many fresh ones check it.
      n: samples that bound the quantile; the cap where the test is adaptive.
      alpha1: failure probability of the center, in (0,1). See `center_smoothing`.
      alpha2: failure probability of the bound on the quantile, in (0,1).
      delta: the ball about the center holds at least 1/2 - delta of the probability, in (0, 1/2).
      bound: "exact" is the binomial order statistic and binomial bounds of the center's check;
        "hoeffding" gives the published code's numbers, Hoeffding's inequality and an interpolated
        quantile; "union", "betting" and "calibrated" test thresholds sequentially on one stream of
        fresh samples, which also checks the center, by the confidence sequence of that name.
      divergence: "l1", "l2" or "linf": a metric, since the proof needs the triangle inequality.
      eps_out_values: the thresholds that an adaptive test decides, in units of the divergence. By
        default a grid about the estimate from the first n0 samples.
      tolerance: relative width of eps_out to stop at, where the grid is the default one.
      clip: whether noisy images are clipped to [0,1].
      step: samples between two decisions of one image.
      noise: "float" is the published code's, float32 normals, and covers no encoder that is built
        to tell them from true ones; "grid" is sound, and rounds and clips, see `certify.noise`.
    """

    sigma: float = 0.25
    eps_in: float = 0.25
    n0: int = 10_000
    n: int = 100_000
    alpha1: float = 0.005
    alpha2: float = 0.005
    delta: float = 0.05
    bound: Literal["exact", "hoeffding", "union", "betting", "calibrated"] = "exact"
    divergence: Literal["l1", "l2", "linf"] = "l2"
    eps_out_values: tuple[float, ...] = ()
    tolerance: float = 0.05
    clip: bool = False
    step: int = 128
    noise: Literal["float", "grid"] = "float"

    def __post_init__(self):
        check_name("noise", self.noise, NOISES)
        check_number(self, "sigma", "eps_in", "tolerance", above=0.0)
        check_number(self, "alpha1", "alpha2", above=0.0, below=1.0)
        check_number(self, "delta", above=0.0, below=0.5)
        check_whole(self, "n0", "n", "step")
        check_flag(self, "clip")
        check_samples(2 * self.n0 + self.n + self.step)
        check_name("bound", self.bound, BOUNDS)
        if not isinstance(self.divergence, str) or self.divergence not in METRICS:
            raise UserError(
                f"Expected a divergence that is a metric ({', '.join(METRICS)}), got "
                f"{self.divergence!r}: the certificate needs the triangle inequality. For cosine, "
                "normalise the representations and use l2: its square is twice the cosine distance."
            )
        check_each("eps_out_values", self.eps_out_values, zero=False)
        self._check_n0()
        check_level(self.level, f"eps_in {self.eps_in:g}", self.sigma)
        if self.bound == "hoeffding":
            hoeffding_level(self.n, self.level, self.alpha2)
            check_interpolated(self.n, self.level, self.alpha2)
        else:
            order_statistic_rank(self.n, self.level, self.alpha2 / (2 if self.adaptive else 1))

    @property
    def adaptive(self) -> bool:
        """Whether the test may stop before n samples."""
        return self.bound in SEQUENCES

    @property
    def level(self) -> float:
        """Level of the quantile to bound, Phi(Phi^-1(1/2 + delta) + eps_in / sigma)."""
        return float(stats.norm.cdf(stats.norm.ppf(0.5 + self.delta) + self.eps_in / self.sigma))

    @property
    def factor(self) -> float:
        """eps_out over the bounded quantile: 1 + the ball's approximation, rounded up.

        Not for "hoeffding", which gives the published code's numbers.
        """
        return (1.0 + APPROXIMATION) * (1.0 if self.bound == "hoeffding" else ROUNDED_UP)

    def _check_n0(self):
        """Raises UserError if n0 samples cannot find a center at delta and alpha1."""
        if self.bound == "hoeffding":
            needed = hoeffding_n0(self.delta, self.alpha1 / 2)
        else:
            needed = smallest_n0(self.delta, self.alpha1 / 2)
        if self.n0 < needed:
            raise UserError(
                f"Expected n0 >= {needed} for a center at delta {self.delta:g} and alpha1 "
                f"{self.alpha1:g}, got {self.n0}. Use n0 = {needed} or more, or a larger delta."
            )
