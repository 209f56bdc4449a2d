"""Randomized smoothing of many images: the reported numbers and the curve; registers it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ur_jax.certify import shares
from ur_jax.certify.randomized.certificate import certified_radius, lower_bound
from ur_jax.certify.randomized.config import RandomizedConfig
from ur_jax.certify.randomized.smoothing import randomized_smoothing
from ur_jax.certify.registry import CERTIFICATES, CertificateKind, Columns
from ur_jax.runs import Row
from ur_jax.stats import intervals
from ur_jax.stats.intervals import Estimate
from ur_jax.types import Curve, Values

RADII = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Radii of the certified accuracy that is reported: the paper's, and 0.5."""


def rows(columns: Columns, config: RandomizedConfig) -> Iterator[Row]:
    """Certified accuracy at radii and average radius; without labels, of what is certified."""
    label, radius, certified = columns["label"], columns["radius"], ~columns["abstained"]
    largest = certified_radius(lower_bound(config.n, config.n, config), config.sigma)
    bounds = (0.0, max(largest, float(radius.max())))
    yield Row.of("certified", _share(certified))
    if (label < 0).any():
        for r in RADII[1:]:
            yield Row.of("certified", _share(radius >= r), radius=r)
        yield Row.of("mean_radius", intervals.mean_interval(radius, bounds=bounds))
        return
    correct = certified & (columns["predicted"] == label)
    for r in RADII:
        yield Row.of("certified_accuracy", _share(correct & (radius >= r)), radius=r)
    # MACER's definition counts an incorrect image 0; the published code leaves it out.
    counted = np.where(correct, radius, 0.0)
    yield Row.of("average_certified_radius", intervals.mean_interval(counted, bounds=bounds))
    if correct.any():
        over_correct = intervals.mean_interval(radius[correct], bounds=bounds)
        yield Row.of(
            "average_certified_radius_correct_only",
            over_correct,
            n_excluded=int((~correct).sum()),
            excluded="" if correct.all() else "images without a certificate of their class",
        )


def curves(columns: Columns) -> Iterator[Curve]:
    """Certified accuracy (without labels, the share certified) against the radius."""
    counted, label, name = ~columns["abstained"], columns["label"], "certified-radius"
    what, caption = "share certified", "Share of images certified at the radius. Robust is high."
    if (label >= 0).all():
        counted = counted & (columns["predicted"] == label)
        name, what = "certified-accuracy", "certified accuracy"
        caption = "Share of images that are classified right, and certified to stay so within the "
        caption += "radius. Robust is high."
    share = shares.at_least(columns["radius"][counted], len(counted))
    caption = f"{caption} {shares.BAND}"
    yield Curve(name, what, "l2 radius (pixel units)", what, caption, *share, kind="step")


def values(columns: Columns, rows: Sequence[Row]) -> Iterator[Values]:
    """Whether each image is certified at a radius; with labels, and classified right."""
    index, label, radius = columns["index"], columns["label"], columns["radius"]
    counted, name = ~columns["abstained"], "certified"
    if (label >= 0).all():
        counted, name = counted & (columns["predicted"] == label), "certified_accuracy"
    for r in RADII:
        yield Values(name, index, (counted & (radius >= r)).astype(np.float64), radius=r)


def _share(hits: np.ndarray) -> Estimate:
    """Share of images with a property."""
    return intervals.proportion_interval(int(hits.sum()), len(hits))


KIND = CERTIFICATES.register(
    "randomized",
    CertificateKind(
        settings=RandomizedConfig,
        smooths="classifier",
        certify=randomized_smoothing,
        num_samples=lambda config: config.n0 + config.n,
        rows=rows,
        curves=curves,
        values=values,
        said=(
            "The class that a classifier gives most often under noise stays the same under every "
            "change of at most the radius in l2. This is certified of the smoothed classifier "
            "(Cohen et al. 2019), not of the classifier itself."
        ),
        presets={
            "adaptive": RandomizedConfig(bound="union"),
            "quick": RandomizedConfig(bound="union", n=10_000),
            "paper": RandomizedConfig(),
        },
    ),
)
