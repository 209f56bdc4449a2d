"""What each metric is: its number with the interval, which way robustness points, its columns.

A metric of one's own, with the job that reports it, needs one file:

    METRICS.register(
        "my_share",
        Metric("proportion", "low", "Share of ...", columns=(Column("my-job", "my share"),)),
    )

It is then in the table on the terminal, in `RESULTS.csv` and, by its column, in the page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ur_jax.errors import UserError, unknown_name
from ur_jax.registry import Registry
from ur_jax.stats.intervals import Estimate, mean_interval, median_interval, proportion_interval

STATISTICS = ("median", "mean", "proportion")
DIRECTIONS = ("low", "high", "")
"""Which values are robust, or better of an accuracy; "" of a metric that tells neither."""


def _every(row: Any, identity: Mapping[str, Any]) -> bool:
    """All rows."""
    return True


@dataclasses.dataclass(frozen=True)
class Column:
    """How a job's rows of a metric stand in the report.

    Attributes:
      job: the job's name in `jobs.JOBS`.
      title: heading of the column.
      labels: whether the number needs labels.
      headline: whether the page's tables have it; otherwise it is only among all numbers.
      shown: (a `runs.Row`, identity of its job) -> whether it belongs to the column: some radii,
        some images. Each eps, radius and kind of images becomes a column, by l2, at the last step.
    """

    job: str
    title: str
    labels: bool = False
    headline: bool = True
    shown: Callable[[Any, Mapping[str, Any]], bool] = _every


@dataclasses.dataclass(frozen=True)
class Metric:
    """How values per image become a reported number, and what it says.

    Attributes:
      statistic: one of `STATISTICS`; it selects the interval (`ur_jax.stats.intervals`).
      robust: one of `DIRECTIONS`.
      definition: what is measured, one sentence.
      paper: where it is defined: a section of the paper (Petrov & Kwiatkowska 2022), or a source.
      columns: one for each job that reports it.

    Raises:
      UserError: for another statistic or direction.
    """

    statistic: str
    robust: str
    definition: str
    paper: str = ""
    columns: tuple[Column, ...] = ()

    def __post_init__(self):
        if self.statistic not in STATISTICS:
            raise unknown_name("statistic", self.statistic, STATISTICS)
        if self.robust not in DIRECTIONS:
            raise UserError(
                f"Expected robust to be 'low', 'high' or '' for neither, got {self.robust!r}."
            )


METRICS: Registry[Metric] = Registry("metric", "ur_jax.metrics", Metric)
"""Every metric that a row may be of, in the order of the report's columns."""


def summarise(name: str, values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """The reported number of one metric, with n and its confidence interval.

    Args:
      name: a key of `METRICS`; its `statistic` selects the interval (`ur_jax.stats.intervals`).
      values: what the metric's function returned, one per independent image or pair [n].
      confidence: coverage of the interval, in (0, 1).

    Returns:
      value, low, high, n.

    Raises:
      UserError: for an unknown metric, no values, NaN or infinite values, or values other than
        0 and 1 for a proportion.
    """
    statistic = METRICS[name].statistic
    if statistic == "median":
        return median_interval(values, confidence=confidence)
    if statistic == "mean":
        return mean_interval(values, confidence=confidence)
    values = np.asarray(values, np.float64).ravel()
    bad = int(np.count_nonzero((values != 0.0) & (values != 1.0)))
    if bad:
        raise UserError(f"Expected {name} of 0 or 1 per image, got {bad} others of {values.size}.")
    return proportion_interval(int(values.sum()), values.size, confidence=confidence)


def _at_headline_radii(row: Any, identity: Mapping[str, Any]) -> bool:
    """Two radii: what the smoothed classifier gets right at all, and within the usual radius."""
    return row.radius in (0.0, 0.25)


def _of_own_kind(row: Any, identity: Mapping[str, Any]) -> bool:
    """A probe on images of the kind that it was trained on."""
    return row.images == identity.get("views", {}).get("kind", row.images)


def _of_representations(row: Any, identity: Mapping[str, Any]) -> bool:
    """A certificate of the representation, not of a classifier."""
    return identity.get("method") != "randomized" and row.images is None


def _both_ways(row: Any, identity: Mapping[str, Any]) -> bool:
    """Impersonations in both directions together."""
    return row.images == "both"


def _evaluate(title: str, headline: bool = True) -> tuple[Column, ...]:
    """A column of the label-free job."""
    return (Column("evaluate", title, headline=headline),)


def _register_ours() -> None:
    """The metrics of this package's jobs."""
    add = METRICS.register
    add("universal_quantile", Metric(
        "median", "low",
        "Share of pairs of clean images that are nearer to each other than the attacked image is "
        "to its clean one; untargeted attack.",
        "section 4", _evaluate("universal quantile"),
    ))  # fmt: skip
    add("universal_quantile_targeted", Metric(
        "median", "high",
        "Share of pairs of clean images that are nearer to each other than the attacked image is "
        "to its target.",
        "section 4", _evaluate("universal quantile, targeted"),
    ))  # fmt: skip
    add("relative_quantile", Metric(
        "median", "high",
        "Distance of the attacked image to its target over the distance at the start.",
        "section 4", _evaluate("relative distance, targeted"),
    ))  # fmt: skip
    add("normalised_distance", Metric(
        "median", "low",
        "Distance of the attacked image to its clean one over the median distance of clean "
        "images; untargeted attack.",
        "section 4", _evaluate("normalised distance", headline=False),
    ))  # fmt: skip
    add("cosine_similarity", Metric(
        "median", "high",
        "Cosine of the attacked image's representation and its clean one; untargeted attack.",
        "", _evaluate("cosine similarity", headline=False),
    ))  # fmt: skip
    add("breakaway_risk", Metric(
        "mean", "low",
        "Share of clean images that are nearer to the attacked image than its own clean one.",
        "section 4", _evaluate("breakaway risk"),
    ))  # fmt: skip
    add("top_1_accuracy", Metric(
        "proportion", "high",
        "Share of attacked images whose own clean image is the nearest; of a probe, of images "
        "that it puts into their class.",
        "section 4",
        (
            Column("evaluate", "nearest neighbour, top 1"),
            Column("probe", "probe's accuracy, top 1", labels=True, shown=_of_own_kind),
        ),
    ))  # fmt: skip
    add("top_5_accuracy", Metric(
        "proportion", "high",
        "Share of attacked images whose own clean image is among the 5 nearest; of a probe, of "
        "images whose class is among its first 5.",
        "section 4",
        (
            Column("evaluate", "nearest neighbour, top 5", headline=False),
            Column("probe", "probe's accuracy, top 5", True, False, _of_own_kind),
        ),
    ))  # fmt: skip
    add("adversarial_margin", Metric(
        "median", "high",
        "Of two images, each attacked towards the other: how much farther from the first the "
        "attacked second is than the attacked first, over their clean distance.",
        "section 4", _evaluate("margin ratio"),
    ))  # fmt: skip
    add("overlap_risk", Metric(
        "proportion", "low",
        "Share of pairs of images with a margin below 0: attacked, they have passed each other.",
        "section 4", _evaluate("overlap risk"),
    ))  # fmt: skip
    add("median_clean_distance", Metric(
        "median", "",
        "Distance of the representations of two clean images.",
        "section 4", _evaluate("median clean distance", headline=False),
    ))  # fmt: skip
    _register_strongest()
    _register_certificates()
    add("impersonation_success", Metric(
        "proportion", "low",
        "Share of attacked images that a probe on clean ones puts into the group of their target.",
        "section 5", (Column("impersonate", "impersonation", labels=True, shown=_both_ways),),
    ))  # fmt: skip
    add("knn_accuracy", Metric(
        "proportion", "high",
        "Share of images whose class is the one that their nearest neighbours vote for.",
        "Wu et al. 2018",
        (Column("knn", "k nearest neighbours, accuracy", labels=True),),
    ))  # fmt: skip


def _register_strongest() -> None:
    """Of the worst of several strong attacks on each image; never mixed with the paper's."""
    add = METRICS.register
    source = "after Croce & Hein 2020"
    add("strongest_universal_quantile", Metric(
        "median", "low",
        "Universal quantile by the strongest attack found: of APGD (l2, cosine, targeted, on the "
        "nearest neighbour) and Square, several starts each, the worst on each image.",
        source, _evaluate("strongest found: universal quantile"),
    ))  # fmt: skip
    add("strongest_normalised_distance", Metric(
        "median", "low",
        "Distance by the strongest attack found over the median distance of clean images.",
        source, _evaluate("strongest found: normalised distance", headline=False),
    ))  # fmt: skip
    add("strongest_breakaway_risk", Metric(
        "mean", "low",
        "Breakaway risk by the strongest attack found, the one of the worst rank on each image.",
        source, _evaluate("strongest found: breakaway risk"),
    ))  # fmt: skip
    add("strongest_top_1_accuracy", Metric(
        "proportion", "high",
        "Share of images whose own clean image is the nearest whichever attack is made.",
        source, _evaluate("strongest found: nearest neighbour, top 1"),
    ))  # fmt: skip
    add("strongest_top_5_accuracy", Metric(
        "proportion", "high",
        "Share of images whose own clean image is among the 5 nearest whichever attack is made.",
        source, _evaluate("strongest found: nearest neighbour, top 5", headline=False),
    ))  # fmt: skip


def _register_certificates() -> None:
    """Of both kinds of smoothing."""
    add = METRICS.register
    center = lambda title, headline=False: (
        Column("certify", title, headline=headline, shown=_of_representations),
    )
    streams = lambda title: (Column("certify", title, headline=False),)
    randomized = lambda title, headline=False, shown=_every: (
        Column("certify", title, True, headline, shown),
    )
    add("median_quantile", Metric(
        "median", "low",
        "Share of pairs of clean images that are nearer to each other than the certified "
        "divergence; 1 without a certificate.",
        "section 4", center("certified divergence, quantile", True),
    ))  # fmt: skip
    add("certified", Metric(
        "proportion", "high",
        "Share of images with a certificate (at a radius, with one of at least that radius).",
        "section 4", center("share with a certificate", True),
    ))  # fmt: skip
    add("median_eps_out", Metric(
        "median", "low",
        "Certified divergence: the smoothed representation moves by no more; infinite without a "
        "certificate.",
        "section 4", center("certified divergence"),
    ))  # fmt: skip
    add("median_normalised", Metric(
        "median", "low",
        "Certified divergence over the median distance of clean images; infinite without a "
        "certificate.",
        "section 4", center("certified divergence, normalised"),
    ))  # fmt: skip
    add("smoothed_eps_out", Metric(
        "median", "low",
        "Certified divergence of another smoothed encoder than center smoothing's, computed of m "
        "samples; infinite without a certificate.",
        "", streams("smoothed encoder, divergence"),
    ))  # fmt: skip
    add("smoothed_eps_out_population", Metric(
        "median", "low",
        "The same of infinitely many samples, without the error of what is computed of m.",
        "", streams("smoothed encoder, population's divergence"),
    ))  # fmt: skip
    add("smoothed_quantile", Metric(
        "median", "low",
        "Share of pairs of clean images that are nearer to each other than the certified "
        "divergence of another smoothed encoder; 1 without a certificate.",
        "", streams("smoothed encoder, quantile"),
    ))  # fmt: skip
    add("smoothed_normalised", Metric(
        "median", "low",
        "Certified divergence of another smoothed encoder over the median distance of clean "
        "images; infinite without a certificate.",
        "", streams("smoothed encoder, normalised"),
    ))  # fmt: skip
    add("certified_cosine", Metric(
        "median", "high",
        "Least cosine that the direction of the smoothed representation keeps within the radius; "
        "-1 without a certificate.",
        "Salman et al. 2019", streams("certified cosine"),
    ))  # fmt: skip
    add("certified_over_found", Metric(
        "median", "",
        "Certified divergence of a smoothed encoder over how far it moves under an attack within "
        "the radius: at least 1, and near 1 where neither certificate nor attack is weak.",
        "", streams("certified over found"),
    ))  # fmt: skip
    add("certified_neighbour", Metric(
        "proportion", "high",
        "Share of images whose own direction is certified to be the nearest within the radius.",
        "Salman et al. 2019", streams("certified nearest neighbour"),
    ))  # fmt: skip
    attacked = lambda title: (Column("attack-certificates", title),)
    add("certificates_broken", Metric(
        "proportion", "low",
        "Share of certified images that an attack moves farther than their certificate allows.",
        "", attacked("certificates broken by attacks"),
    ))  # fmt: skip
    add("moved_over_certified", Metric(
        "median", "",
        "Divergence of the smoothed representation by the worst of five attacks over the "
        "certified one: how much of the certificate is reached.",
        "", attacked("divergence by attacks over the certified one"),
    ))  # fmt: skip
    add("certified_accuracy", Metric(
        "proportion", "high",
        "Share of images that the smoothed classifier gets right within the radius.",
        "Cohen et al. 2019", randomized("certified accuracy", True, _at_headline_radii),
    ))  # fmt: skip
    add("average_certified_radius", Metric(
        "mean", "high",
        "Certified radius over all images, 0 where the smoothed classifier is wrong.",
        "Zhai et al. 2020", randomized("average certified radius", True),
    ))  # fmt: skip
    add("average_certified_radius_correct_only", Metric(
        "mean", "high",
        "Certified radius over the images that the smoothed classifier gets right.",
        "the authors' code", randomized("average certified radius, correct only"),
    ))  # fmt: skip
    add("mean_radius", Metric(
        "mean", "high",
        "Certified radius over all images, of whatever class the smoothed classifier finds.",
        "", randomized("mean certified radius"),
    ))  # fmt: skip


_register_ours()
