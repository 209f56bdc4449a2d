"""Center smoothing from the samples of a stream, to stand beside the other certificates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from ur_jax.certify.center.config import APPROXIMATION
from ur_jax.certify.enclosing import half, kth_smallest, smallest_n0
from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.joint.stream import Measured
from ur_jax.checks import check_number
from ur_jax.distances import ROUNDED_UP, distance, pairwise_distances
from ur_jax.errors import UserError
from ur_jax.stats.bounds import accepting_count, clopper_pearson_lower, order_statistic_rank
from ur_jax.types import Array, PyTree

_ROWS = 128


@dataclass(frozen=True)
class StreamCenterConfig(StreamConfig):
    """Settings of center smoothing on a stream, of a fixed number of samples.

    Attributes:
      delta: the ball about the center holds at least 1/2 - delta of the probability, in (0, 1/2).
    """

    n0: int = 10_000
    delta: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "delta", above=0.0, below=0.5)
        if self.adaptive:
            raise UserError("Expected adaptive=False with the center of a stream.")
        if self.n0 < (needed := smallest_n0(self.delta, self.alpha1 / 2)):
            raise UserError(f"Expected n0 >= {needed} for a center at delta {self.delta:g}.")
        for eps in self.eps_in:
            order_statistic_rank(self.n, self.level(eps), self.alpha2 / len(self.eps_in))

    def level(self, eps_in: float) -> float:
        """Level of the quantile to bound, Phi(Phi^-1(1/2 + delta) + eps_in / sigma)."""
        return float(stats.norm.cdf(stats.norm.ppf(0.5 + self.delta) + eps_in / self.sigma))


class StreamCenterCertificate(NamedTuple):
    """Certificate of one image; see `CenterCertificate`. `eps_out` [J] is by eps_in."""

    eps_out: np.ndarray
    abstained: bool
    reason: str
    smoothing_error: float
    n: int
    num_drawn: int
    num_bad: int


@dataclass(frozen=True)
class StreamCenter:
    """Center smoothing, as `center_smoothing` with the exact bound, on the samples of a stream.

    **Guarantee.** That of `center_smoothing`, with all n fresh samples of the stream for the check
    of the center (alpha1 / 2) and for the bound (alpha2, divided over eps_in) alike: both hold but
    for the sum. Where the check fails it abstains.
    """

    config: StreamCenterConfig

    def anchor(self, representations: Array, fixed: PyTree) -> PyTree:
        """The sample whose median distance to all is smallest, and that distance."""
        n = len(representations)
        rows = jnp.pad(representations, ((0, -n % _ROWS), (0, 0))).reshape(
            -1, _ROWS, *representations.shape[1:]
        )
        median = lambda block: kth_smallest(pairwise_distances(block, representations), half(n))
        medians = jax.lax.map(median, rows).ravel()[:n]
        at = jnp.argmin(medians)
        return {"center": representations[at], "radius": medians[at]}

    def measure(
        self, anchor: PyTree, representations: Array, exists: Array
    ) -> tuple[PyTree, PyTree]:
        """Distances from the center."""
        center = jnp.broadcast_to(anchor["center"], representations.shape)
        return distance(representations, center), ()

    def certificate(self, measured: Measured) -> StreamCenterCertificate:
        """The certificate of n distances."""
        config, n = self.config, measured.n
        away = np.sort(measured.rows)
        total = config.n0 + config.n
        alpha2 = config.spent(config.alpha2, measured.num_values, total) / len(config.eps_in)
        alpha1 = config.spent(config.alpha1, measured.num_values, total)
        ranks = [int(accepting_count(n, config.level(eps), alpha2)) for eps in config.eps_in]
        factor = (1 + APPROXIMATION) * ROUNDED_UP
        eps_out = np.array([factor * away[k - 1] if k <= n else math.inf for k in ranks])
        inside = int((away <= measured.anchor["radius"]).sum())
        reason = ""
        if measured.num_bad:
            reason = "representations not finite"
        elif clopper_pearson_lower(inside, n, alpha1 / 2) < 0.5 - config.delta:
            reason = "the ball about the center holds too few fresh samples"
        return StreamCenterCertificate(
            eps_out=np.full_like(eps_out, math.inf) if reason else eps_out,
            abstained=bool(reason),
            reason=reason,
            smoothing_error=float(np.linalg.norm(measured.clean - measured.anchor["center"])),
            n=n,
            num_drawn=measured.num_drawn,
            num_bad=measured.num_bad,
        )

    def is_settled(self, certificate: StreamCenterCertificate, measured: Measured) -> bool:
        """Never before all samples."""
        return False
