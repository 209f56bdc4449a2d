"""The certificates of a stream over many images: the reported numbers and the curves; registers
them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import stats

from ur_jax import metrics
from ur_jax.certify import shares
from ur_jax.certify.center.table import median_with_infinity
from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.joint.cosine import CosineConfig
from ur_jax.certify.joint.geometric_median import GeometricMedianConfig
from ur_jax.certify.joint.mean import MeanConfig
from ur_jax.certify.joint.neighbour import NeighbourConfig
from ur_jax.certify.joint.smoothed import certify_alone
from ur_jax.certify.registry import CERTIFICATES, CertificateKind, Columns
from ur_jax.runs import Row
from ur_jax.stats import intervals
from ur_jax.types import Curve, Values

SAID = {
    "geometric_median": (
        "The geometric median of an image's representations under noise is within eps_out of the "
        "certificate's centre, whatever change of at most eps_in in l2 is made to the image. This "
        "is certified of another function than the encoder or its center smoothing: of the "
        "smoothed encoder whose value is that geometric median, computed of m samples."
    ),
    "mean": (
        "The mean of an image's representations under noise moves by at most eps_out, whatever "
        "change of at most eps_in in l2 is made to the image. This is certified of another "
        "function than the encoder or its center smoothing: of the smoothed encoder whose value "
        "is that mean of representations clipped to one ball, computed of m samples."
    ),
    "cosine": (
        "The mean direction of an image's representations under noise keeps at least the certified "
        "cosine with a direction found at the image, whatever change of at most the radius in l2 "
        "is made to the image. This is certified of the smoothed encoder whose value is that mean "
        "direction, computed of m samples, not of the encoder itself."
    ),
    "neighbour": (
        "Among fixed directions (of an index of images, or of classes' texts or weights), the one "
        "nearest to the mean direction of an image's representations under noise stays the nearest "
        "under every change of at most the radius in l2. This is certified of the smoothed encoder "
        "whose value is that mean direction, computed of m samples, not of the encoder itself."
    ),
}
"""What each certifies, and of which function: two sentences for the report."""


def relative(columns: Columns, distribution: metrics.DistanceDistribution) -> Columns:
    """F(eps_out) and eps_out / median F by eps_in; 1 and infinity where nothing is certified."""
    eps_out = jnp.asarray(np.stack(list(columns["eps_out"])).astype(np.float32))
    divergence = distribution.divergence or "l2"
    quantile = metrics.universal_quantile(distribution, eps_out, divergence=divergence)
    normalised = metrics.normalised_distance(distribution, eps_out, divergence=divergence)
    return {"quantile": np.asarray(quantile), "normalised": np.asarray(normalised)}


_ROWS = {
    "eps_out": "smoothed_eps_out",
    "eps_out_population": "smoothed_eps_out_population",
    "quantile": "smoothed_quantile",
    "normalised": "smoothed_normalised",
    "cosine": "certified_cosine",
}


def rows(method: str, columns: Columns, config: StreamConfig) -> Iterator[Row]:
    """Share certified, and medians over all images, of each eps_in; `images` names the method."""
    certified = ~columns["abstained"]
    share = intervals.proportion_interval(int(certified.sum()), len(certified))
    yield Row.of("certified", share, images=method)
    for name, metric in _ROWS.items():
        if name not in columns:
            continue
        values = np.stack(list(columns[name])).astype(np.float64)
        for j, eps in enumerate(config.eps_in):
            estimate = median_with_infinity(values[:, j])
            yield Row.of(metric, estimate, radius=eps, images=method)


def values(method: str, columns: Columns, rows: Sequence[Row]) -> Iterator[Values]:
    """What is certified of each image at each eps_in; infinite, or no cosine, without."""
    for name, metric in _ROWS.items():
        radii = [row.radius for row in rows if row.metric == metric and row.images == method]
        for j, radius in enumerate(radii):
            each = np.stack(list(columns[name]))[:, j].astype(np.float64)
            yield Values(metric, columns["index"], each, radius=radius, images=method)


def neighbour_values(columns: Columns, rows: Sequence[Row]) -> Iterator[Values]:
    """Whether the nearest direction of each image is the right one, certified within a radius."""
    right = ~columns["abstained"] & (columns["predicted"] == columns["label"])
    for row in rows:
        if row.metric == "certified_neighbour":
            hits = right & (columns["radius"] >= row.radius)
            yield Values(row.metric, columns["index"], hits.astype(np.float64), radius=row.radius)


def curves(method: str, columns: Columns) -> Iterator[Curve]:
    """Share of images against their certified divergence at the first eps_in, in two units."""
    for name, label in (
        ("quantile", "eps_out as a quantile of clean distances"),
        ("normalised", "eps_out / median clean distance"),
    ):
        certified = np.stack(list(columns[name]))[:, 0][~columns["abstained"]]
        yield Curve(
            f"certified-divergence-{method.replace('_', '-')}", name, label, "share of images",
            "Share of images whose certified divergence is at most x; what is missing to 1 has no "
            f"certificate. Robust is left and high. {shares.BAND} {SAID[method]}",
            *shares.at_most(certified, len(columns["abstained"])), kind="step",
        )  # fmt: skip


def cosine_curves(columns: Columns) -> Iterator[Curve]:
    """The certified cosine: its median over images against the radius, in units of sigma, and the
    share of images that keep at least each at the first eps_in."""
    ratio = np.linspace(0.0, 3.0, 61)
    lower = np.clip(columns["lower"].astype(np.float64), -1.0, 1.0)
    cosine = 2 * stats.norm.cdf(stats.norm.ppf((1 + lower) / 2)[:, None] - ratio) - 1
    cosine = np.where(cosine >= 0, cosine, -1.0)
    cosine[columns["abstained"] & (columns["num_bad"] > 0)] = -1.0
    levels = 0.25, 0.5, 0.75
    found = np.quantile(cosine, levels, axis=0)
    # Where that share of the images has none, -1, no value between it and another's is shown.
    found[np.quantile(cosine, levels, axis=0, method="lower") < 0] = np.nan
    low, middle, high = found
    caption = (
        "Against the radius: the least cosine that the direction of the population's smoothed "
        "encoder keeps within it, as median over images (band: quartiles), to where so many of "
        "them have none. At the first eps_in: share of images whose certified cosine there, the "
        f"number reported, is at least x. {shares.BAND} Robust is high. {SAID['cosine']}"
    )
    yield Curve(
        "certified-cosine", "against the radius", "l2 radius / sigma", "certified cosine", caption,
        ratio, middle, low, high,
    )  # fmt: skip
    certified = np.stack(list(columns["cosine"]))[:, 0]
    share = shares.at_least(certified[~columns["abstained"] & (certified >= 0)], len(cosine))
    yield Curve(
        "certified-cosine", "at the first eps_in", "certified cosine", "share of images", caption,
        *share, kind="step",
    )  # fmt: skip


def neighbour_rows(columns: Columns, config: NeighbourConfig) -> Iterator[Row]:
    """Share certified (right, where there are labels) at each eps_in, and the mean radius."""
    certified, radius, label = ~columns["abstained"], columns["radius"], columns["label"]
    share = lambda hits: intervals.proportion_interval(int(hits.sum()), len(hits))
    largest = config.sigma * float(stats.norm.ppf(1 - 5e-13))
    yield Row.of("certified", share(certified), images="neighbour")
    if (label >= 0).all():
        certified = certified & (columns["predicted"] == label)
        yield Row.of("certified_neighbour", share(certified), radius=0.0)
        for eps in config.eps_in:
            yield Row.of("certified_neighbour", share(certified & (radius >= eps)), radius=eps)
    counted = np.where(certified, radius, 0.0)
    found = intervals.mean_interval(counted, bounds=(0.0, largest))
    yield Row.of("mean_radius", found, images="neighbour")


def neighbour_curves(columns: Columns) -> Iterator[Curve]:
    """Share of images whose nearest direction is certified (and right) against the radius."""
    counted = ~columns["abstained"]
    if (columns["label"] >= 0).all():
        counted = counted & (columns["predicted"] == columns["label"])
    yield Curve(
        "certified-neighbour", "nearest direction", "l2 radius (pixel units)", "share of images",
        "Share of images whose own direction is certified to be the nearest within the radius. "
        f"Robust is high. {shares.BAND} {SAID['neighbour']}",
        *shares.at_least(columns["radius"][counted], len(counted)), kind="step",
    )  # fmt: skip


def _register(
    name: str, settings: type[StreamConfig], smooths: Any, rows: Callable, curves: Callable,
    values: Callable, relative: Callable | None,
) -> None:  # fmt: skip
    """One kind, with the presets of all."""
    CERTIFICATES.register(
        name,
        CertificateKind(
            settings=settings,
            smooths=smooths,
            certify=certify_alone,
            num_samples=lambda config: config.n0 + config.n,
            rows=rows,
            relative=relative,
            curves=curves,
            values=values,
            said=SAID[name],
            presets={
                "adaptive": settings(adaptive=True),
                "quick": settings(n=2000, m=2000),
                "paper": settings(n0=10_000, n=100_000, m=100_000)
                if relative is not None and settings is not CosineConfig
                else settings(),
            },
        ),
    )


for _name, _settings, _curves in (
    ("geometric_median", GeometricMedianConfig, functools.partial(curves, "geometric_median")),
    ("mean", MeanConfig, functools.partial(curves, "mean")),
    ("cosine", CosineConfig, cosine_curves),
):
    _rows, _values = functools.partial(rows, _name), functools.partial(values, _name)
    _register(_name, _settings, "encoder", _rows, _curves, _values, relative)
_register(
    "neighbour", NeighbourConfig, "directions", neighbour_rows, neighbour_curves, neighbour_values,
    None,
)  # fmt: skip
