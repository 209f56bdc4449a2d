"""Settings of randomized smoothing, refused before any sampling where they can never succeed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from ur_jax.certify.inputs import check_each, check_name, check_samples
from ur_jax.certify.noise import NOISES
from ur_jax.checks import check_flag, check_number, check_whole
from ur_jax.errors import UserError
from ur_jax.stats.bounds import accepting_count, check_level

BOUNDS = ("exact", "union", "betting", "calibrated")


@dataclass(frozen=True)
class RandomizedConfig:
    """Settings of randomized smoothing; the defaults are the paper's.

    Attributes:
      sigma: standard deviation of the noise in pixel units, > 0.
      n0: samples that select the class, >= 1.
      n: samples of the test; the cap where it is adaptive.
      alpha: failure probability of a certificate, in (0,1). See `randomized_smoothing`.
      bound: "exact" draws all n samples and bounds by Clopper-Pearson; "union" and "betting" stop
        as soon as the answer is clear, by the confidence sequence of that name, and "calibrated",
        which needs `radii`, by one that spends all of alpha at them.
      radii: l2 radii to decide, in pixel units. An adaptive test stops once all are decided.
      tolerance: without radii, an adaptive test stops once the certified radius is within this of
        what is still in reach, in pixel units; sigma / 10 by default.
      clip: whether noisy images are clipped to [0,1], as the reference does.
      step: samples between two decisions of one image.
      noise: "float" is the published code's, float32 normals, and covers no encoder that is built
        to tell them from true ones; "grid" is sound, and rounds and clips, see `certify.noise`.
      randomize: of the bound "exact", spend all of alpha by a uniform number that is kept with the
        count, see `stats.bounds.randomized_lower`.
    """

    sigma: float = 0.25
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    bound: Literal["exact", "union", "betting", "calibrated"] = "exact"
    radii: tuple[float, ...] = ()
    tolerance: float | None = None
    clip: bool = True
    step: int = 128
    noise: Literal["float", "grid"] = "float"
    randomize: bool = False

    def __post_init__(self):
        check_number(self, "sigma", above=0.0)
        check_name("noise", self.noise, NOISES)
        check_number(self, "alpha", above=0.0, below=1.0)
        check_whole(self, "n0", "n", "step")
        check_flag(self, "clip", "randomize")
        if self.randomize and self.bound != "exact":
            raise UserError(f"Expected the bound 'exact' with randomize, got {self.bound!r}.")
        check_samples(self.n0 + self.n + self.step)
        check_name("bound", self.bound, BOUNDS)
        check_each("radii", self.radii, zero=True)
        if self.bound == "calibrated" and not self.radii:
            raise UserError(
                "Expected radii for the bound 'calibrated', which spends alpha at them."
            )
        if self.tolerance is not None:
            check_number(self, "tolerance", above=0.0)
        share = self.alpha if self.bound == "exact" else self.alpha / 2
        for radius in self.radii or (0.0,):
            level = float(stats.norm.cdf(radius / self.sigma))
            check_level(level, f"radius {radius:g}", self.sigma)
            if int(accepting_count(self.n, level, share)) > self.n:
                needed = math.ceil(math.log(share) / math.log(level))
                raise UserError(
                    f"Expected n >= {needed} to certify radius {radius:g} at sigma {self.sigma:g} "
                    f"and alpha {self.alpha:g}, got {self.n}: not even {self.n} successes would "
                    f"do. Use n = {needed} or more, or smaller radii."
                )

    @property
    def levels(self) -> np.ndarray:
        """Probability of the class that makes each radius robust, [J]."""
        return stats.norm.cdf(np.asarray(self.radii) / self.sigma)
