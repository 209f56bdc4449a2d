"""What the certificates of one stream of samples have in common: their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from ur_jax.certify.inputs import check_each, check_name, check_samples
from ur_jax.certify.noise import NOISES, total_variation
from ur_jax.checks import check_flag, check_number, check_whole
from ur_jax.errors import UserError
from ur_jax.stats.bounds import UnionBound, check_level


@dataclass(frozen=True)
class StreamConfig:
    """Settings that all certificates of one stream share.

    Attributes:
      sigma: standard deviation of the noise in pixel units, > 0.
      eps_in: l2 radii of the inputs that are covered, in pixel units, each > 0; the first is the
        one that decides about abstaining, and what an adaptive run looks at.
      n0: samples of the first stage, which fixes centres and directions.
      n: samples of the second stage, which bound; the cap of an adaptive run.
      m: samples of which whoever uses the smoothed encoder computes it, see `smoothed`.
      alpha1: failure probability of what is computed of m samples, in (0,1).
      alpha2: failure probability of the bounds at the image, in (0,1).
      adaptive: stop before n samples where the bound is within `tolerance` of what n would give;
        what is said holds at every look.
      tolerance: relative, of eps_out (of 1 - cosine; of a radius to sigma).
      noise: "grid" is sound, for images of 256 grey values, and rounds and clips; "float" is added
        float32 normals, and covers no encoder that is built to tell them from true ones.
      clip: with "float", whether noisy images are clipped to [0,1].
      step: samples between two looks, and in one piece on the device.
    """

    sigma: float = 0.25
    eps_in: tuple[float, ...] = (0.25,)
    n0: int = 1000
    n: int = 10_000
    m: int = 10_000
    alpha1: float = 0.005
    alpha2: float = 0.005
    adaptive: bool = False
    tolerance: float = 0.05
    noise: Literal["grid", "float"] = "grid"
    clip: bool = False
    step: int = 1000

    def __post_init__(self):
        check_number(self, "sigma", "tolerance", above=0.0)
        check_number(self, "alpha1", "alpha2", above=0.0, below=1.0)
        check_whole(self, "n0", "n", "m", "step")
        check_flag(self, "adaptive", "clip")
        check_samples(self.n0 + self.n + 2 * self.step)
        check_name("noise", self.noise, NOISES)
        check_each("eps_in", self.eps_in, zero=False)
        if not self.eps_in:
            raise UserError("Expected at least one radius as eps_in, got none.")
        for eps in self.eps_in:
            check_level(float(stats.norm.cdf(eps / self.sigma)), f"eps_in {eps:g}", self.sigma)

    @property
    def sampling(self) -> tuple:
        """What certificates must agree in to be of one stream."""
        return (
            self.sigma, self.n0, self.n, self.noise, self.clip or self.noise == "grid", self.step,
        )  # fmt: skip

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of second-stage samples at which bounds are looked at; one of a fixed run."""
        if not self.adaptive:
            return (self.n,)
        return tuple(int(n) for n in UnionBound(self.alpha2, self.n, self.step, 1.5).schedule)

    def share(self, n: int) -> float:
        """The part of a failure probability that the look after n samples has."""
        looks = self.looks
        return 1.0 if len(looks) == 1 else 0.5 if n == self.n else 0.5 / (len(looks) - 1)

    def spent(self, alpha: float, num_values: int, num_samples: int) -> float:
        """A failure probability less what the noise differs from the true one by.

        Args:
          alpha: what is promised.
          num_values: of an image, height * width * channels.
          num_samples: samples that it is about.

        Raises:
          UserError: if nothing is left.
        """
        left = alpha
        if self.noise == "grid":
            left -= total_variation(num_values, num_samples)
        if left <= 0:
            raise UserError(
                f"Expected a larger alpha than {alpha:g}: the noise of {num_samples} samples "
                f"differs from the true one by more, {alpha - left:.2g}."
            )
        return left

    def moved(self, probability: np.ndarray | float, radius: np.ndarray | float) -> np.ndarray:
        """Phi(Phi^-1(p) - radius / sigma): what is left of a probability within a radius."""
        return stats.norm.cdf(stats.norm.ppf(probability) - np.asarray(radius) / self.sigma)
