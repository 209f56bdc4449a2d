"""The certificate of randomized smoothing, and what follows from its count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from scipy import stats

from ur_jax.certify.randomized.config import RandomizedConfig
from ur_jax.certify.sequential import Outcome, num_selection_pieces
from ur_jax.checks import check_number, check_type, check_whole
from ur_jax.errors import UserError
from ur_jax.stats.bounds import (
    ConfidenceSequence,
    check_counts,
    clopper_pearson_lower,
    randomized_lower,
)
from ur_jax.stats.sequences import confidence_sequence


class RadiusCertificate(NamedTuple):
    """Certificate of one image by randomized smoothing.

    Attributes:
      predicted: the class selected by the first n0 samples; certified unless `abstained`.
      abstained: whether nothing is certified.
      reason: why, or "".
      radius: certified l2 radius in pixel units; 0 where it abstained.
      decisions: one of "robust", "not robust", "undecided" for each of the configured radii.
        "not robust" is a statement about the smoothed classifier or, at the cap, out of reach.
      lower: lower confidence bound of the probability of the class.
      count: samples of the test that gave the class.
      n: samples of the test that were drawn.
      num_drawn: all samples drawn.
      num_bad: samples whose logits are not finite.
      uniform: what the bound was randomised by; 1 where it was not.
    """

    predicted: int
    abstained: bool
    reason: str
    radius: float
    decisions: tuple[str, ...]
    lower: float
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (a tuple's method of that name)
    n: int
    num_drawn: int
    num_bad: int
    uniform: float = 1.0


def make_certificate(
    outcome: Outcome, config: RandomizedConfig, uniform: float = 1.0
) -> RadiusCertificate:
    """The certificate from an image's counts."""
    top, verdicts = outcome.answer
    pieces = outcome.pieces - num_selection_pieces(config.n0, config.step)
    n = min(max(pieces, 0) * config.step, config.n)
    count = int(outcome.counts[top]) if pieces > 0 else 0
    lower = lower_bound(count, n, config, uniform) if n else 0.0
    reason = ""
    if outcome.num_bad:
        lower, reason = 0.0, "logits not finite"
    elif lower <= 0.5:
        reason = "no class clearly has the majority"
    radius = certified_radius(lower, config.sigma)
    if config.bound == "exact" or reason == "logits not finite":
        words = ["robust" if lower > 0.5 and lower >= p else "undecided" for p in config.levels]
    else:
        words = [{1: "robust", -1: "not robust", 0: "undecided"}[int(v)] for v in verdicts]
        words = words if config.radii else []
    # A radius that is decided while the bound has moved back stays decided: see the guarantee.
    robust = [r for r, word in zip(config.radii, words) if word == "robust"]
    radius = max([radius, *robust])
    return RadiusCertificate(
        predicted=int(top),
        abstained=not (lower > 0.5 or robust),
        reason="" if robust else reason,
        radius=radius,
        decisions=tuple(words),
        lower=lower,
        count=count,
        n=n,
        num_drawn=config.n0 + n,
        num_bad=outcome.num_bad,
        uniform=uniform,
    )


def lower_bound(count: int, n: int, config: RandomizedConfig, uniform: float = 1.0) -> float:
    """Returns the lower bound of the class probability after n samples of the test.

    With another `config.alpha` than at sampling, this derives the certificate anew: a fixed bound
    and a confidence sequence hold for each alpha that is chosen without looking at the counts.

    Raises:
      UserError: for a count that is none of n samples.
    """
    check_type("config", config, RandomizedConfig)
    check_whole(SimpleNamespace(count=count, n=n), "count", "n", least=0)
    check_counts(n, count)
    if config.bound == "exact":
        if config.randomize:
            return float(randomized_lower(count, n, config.alpha, uniform))
        return float(clopper_pearson_lower(count, n, config.alpha))
    return float(sequence(config).lower(count, n))


def certified_radius(lower: float, sigma: float) -> float:
    """Returns sigma Phi^-1(lower), the l2 radius; 0 unless lower > 1/2 (Cohen et al., eq. 3).

    Raises:
      UserError: for a lower bound that is no probability, or a sigma <= 0.
    """
    arguments = SimpleNamespace(lower=lower, sigma=sigma)
    check_number(arguments, "lower", least=0.0, most=1.0)
    check_number(arguments, "sigma", above=0.0)
    return float(sigma * stats.norm.ppf(lower)) if lower > 0.5 else 0.0


def sequence(config: RandomizedConfig) -> ConfidenceSequence:
    """The confidence sequence of an adaptive configuration."""
    levels = tuple(float(p) for p in config.levels) if config.bound == "calibrated" else ()
    return confidence_sequence(
        config.bound, alpha=config.alpha, n_max=config.n, step=config.step, levels=levels
    )


def certified_accuracy(radius: np.ndarray, correct: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Fraction of images that are correct and certified at each radius.

    Args:
      radius: [N] certified radii, 0 where it abstained.
      correct: [N] bool, not abstained and the label predicted.
      radii: [J] radii to evaluate at.

    Returns:
      [J] float64. At radius 0 an image has to be correct and not abstained.

    Raises:
      UserError: for radii that are none, or another number of images in `correct`.
    """
    radius, correct = _checked(radius, correct)
    if not np.issubdtype(np.asarray(radii).dtype, np.number) or np.ndim(radii) > 1:
        raise UserError(f"Expected numbers as radii [J], got {radii!r}.")
    return (correct[:, None] & (radius[:, None] >= np.asarray(radii))).mean(axis=0)


def average_certified_radius(
    radius: np.ndarray, correct: np.ndarray, *, only_correct: bool = False
) -> float:
    """Mean certified radius, in pixel units.

    Args:
      radius: [N] certified radii, 0 where it abstained.
      correct: [N] bool, not abstained and the label predicted.
      only_correct: False is MACER's definition, where an incorrect image counts 0; True is what the
        published code computes, the mean over correct images only (0 if there is none).

    Raises:
      UserError: as `certified_accuracy`.

    Reference: Zhai et al., MACER (2020), equation for ACR.
    """
    radius, correct = _checked(radius, correct)
    total = float(np.where(correct, radius, 0.0).sum())
    return total / max(int(correct.sum()) if only_correct else correct.size, 1)


def _checked(radius: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Radii [N] >= 0 and whether each image counts [N]."""
    radius, correct = np.asarray(radius), np.asarray(correct)
    if radius.ndim != 1 or radius.shape != correct.shape or not radius.size:
        raise UserError(
            f"Expected radius and correct of the same images [N], got {radius.shape} and "
            f"{correct.shape}."
        )
    if correct.dtype != bool or not np.issubdtype(radius.dtype, np.floating):
        raise UserError(
            f"Expected radius float and correct bool, got {radius.dtype} and {correct.dtype}."
        )
    if not np.all(radius >= 0):  # which NaN is not either
        raise UserError("Expected certified radii >= 0, got a negative one or NaN.")
    return radius, correct
