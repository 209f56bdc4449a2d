"""Center smoothing of many images: the reported numbers and the curves; registers it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from ur_jax import metrics
from ur_jax.certify import shares
from ur_jax.certify.center.config import CenterConfig
from ur_jax.certify.center.smoothing import center_smoothing
from ur_jax.certify.registry import CERTIFICATES, CertificateKind, Columns
from ur_jax.runs import Row
from ur_jax.stats import intervals
from ur_jax.stats.intervals import Estimate
from ur_jax.types import Curve, Values

_CAPTION = (
    "Share of images whose certified divergence is at most x; what is missing to 1 has no "
    f"certificate. Robust is left and high. {shares.BAND}"
)


def relative(columns: Columns, distribution: metrics.DistanceDistribution) -> Columns:
    """F(eps_out) and eps_out / median F; 1 and infinity where it abstained."""
    eps_out = jnp.asarray(columns["eps_out"].astype(np.float32))
    quantile = metrics.universal_quantile(distribution, eps_out, divergence="l2")
    normalised = metrics.normalised_distance(distribution, eps_out, divergence="l2")
    return {
        "quantile": np.asarray(quantile),
        "normalised": np.asarray(normalised),
    }


def rows(columns: Columns, config: CenterConfig) -> Iterator[Row]:
    """Share certified, and medians over all images."""
    certified = ~columns["abstained"]
    yield Row.of("certified", intervals.proportion_interval(int(certified.sum()), len(certified)))
    for name in ("eps_out", "quantile", "normalised"):
        yield Row.of(f"median_{name}", median_with_infinity(columns[name]))


def curves(columns: Columns) -> Iterator[Curve]:
    """Share of images against their certified divergence, in two units."""
    for name, label in (
        ("quantile", "eps_out as a quantile of clean distances"),
        ("normalised", "eps_out / median clean distance"),
    ):
        certified = columns[name][~columns["abstained"]]
        share = shares.at_most(certified, len(columns["abstained"]))
        yield Curve(
            "certified-divergence", name, label, "share of images", _CAPTION, *share, kind="step"
        )


def values(columns: Columns, rows: Sequence[Row]) -> Iterator[Values]:
    """Certified divergence in each unit; infinite without a certificate."""
    for name in ("eps_out", "quantile", "normalised"):
        yield Values(f"median_{name}", columns["index"], columns[name].astype(np.float64))


def median_with_infinity(values: np.ndarray) -> Estimate:
    """Median with its interval, where an abstention is the largest value of all."""
    largest = np.finfo(np.float64).max
    value, low, high, n = intervals.median_interval(np.minimum(values.astype(np.float64), largest))
    value, low, high = (math.inf if v > largest / 4 else v for v in (value, low, high))
    return Estimate(value, low, high, n)


KIND = CERTIFICATES.register(
    "center",
    CertificateKind(
        settings=CenterConfig,
        smooths="encoder",
        certify=center_smoothing,
        num_samples=lambda config: 2 * config.n0 + config.n,
        rows=rows,
        relative=relative,
        curves=curves,
        values=values,
        said=(
            "The center of an image's representations under noise is within eps_out of the "
            "certificate's, whatever change of at most eps_in in l2 is made to the image. This is "
            "certified of the smoothed encoder whose value is that center (Kumar and Goldstein "
            "2021), not of the encoder itself."
        ),
        presets={
            "adaptive": CenterConfig(bound="union"),
            "quick": CenterConfig(bound="union", n0=1000, n=10_000),
            "paper": CenterConfig(bound="hoeffding"),
        },
    ),
)
