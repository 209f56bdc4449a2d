"""The evaluation doubts itself: signs that its numbers say less than they seem to.

After AutoAttack's checks of classifiers (Croce et al. 2022), for encoders. A doubt has a name, what
was seen, its cause and what to do; none stops a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ur_jax.jobs import strongest
from ur_jax.jobs.label_free_config import EvaluationConfig
from ur_jax.runs import Run

_FLAT = 0.01  # of the images: with a step without gradient
_GROWS = 0.02  # of the median distance, in the last quarter of the budget
_SQUARE_MORE, _SQUARE_ON = 1.02, 0.05  # times the distance of gradients, on a share of the images
_STARTS = 0.10  # of the median image's distance, between the starts of one attack
_SAME, _COLLAPSED = 1e-3, 1e-5  # of the norm of a representation

Doubt = dict[str, str]


def found(
    run: Run, stages: Sequence[str], bank: Mapping[str, np.ndarray], config: EvaluationConfig
) -> list[Doubt]:
    """The doubts of a finished run, {name, seen, cause, remedy} each; [] where there are none."""
    doubts = list(_of_bank(bank)) if bank else []
    if "strongest" in stages:
        for eps in config.strong_eps:
            doubts += _of_attacks(run.read_parts(strongest.part_name(eps)), eps, config)
    return doubts


def remarks(doubts: Iterable[Doubt]) -> Iterator[str]:
    """A line for each."""
    for doubt in doubts:
        yield f"DOUBT ({doubt['name']}): {doubt['seen']} {doubt['cause']} {doubt['remedy']}"


def _of_bank(bank: Mapping[str, np.ndarray]) -> Iterator[Doubt]:
    """Whether most clean images have one representation."""
    clean = np.asarray(bank["clean"], np.float64)[:1000]
    if len(clean) < 3:
        return
    first = np.linalg.norm(clean[1:] - clean[:-1], axis=1)
    scale = np.median(np.linalg.norm(clean, axis=1))
    if np.median(first) <= _COLLAPSED * max(scale, 1e-300):
        yield _doubt(
            "collapsed bank",
            f"The median distance of clean representations is {np.median(first):.1e}, their norm "
            f"{scale:.1e}.",
            "Most images have the same representation, to rounding: quantiles and normalised "
            "distances are of nothing.",
            "Look at the encoder's training, and at the scale of the pixels that it expects.",
        )


def _of_attacks(
    part: Mapping[str, np.ndarray], eps: float, config: EvaluationConfig
) -> Iterator[Doubt]:
    """Whether the strongest attacks at an eps were hindered, or were not done."""
    strong = config.strong(eps)
    members, at = list(strong.members), f"At eps {eps:g}"
    far = strongest.of_members(part["distances"], strong)  # (N,M,S)
    growth, flat = (strongest.of_members(part[name], strong) for name in ("growth", "flat"))
    norm = np.median(np.linalg.norm(part["clean"], axis=1))
    if (differs := float(part["again"].max())) > _SAME * norm:
        yield _doubt(
            "random encoder",
            f"Two calls of the encoder on the same images differ by {differs:.1e}.",
            "Chance is at work inside it, and an attack on one draw is none on the next.",
            "Put it in inference mode, or attack its expectation with attacks.eot_pgd.",
        )
    by_gradient = [place for place, name in enumerate(members) if name != "square"]
    flat_share = float(np.mean((flat[:, by_gradient] > 0).any((1, 2))))
    if flat_share > _FLAT:
        yield _doubt(
            "zero gradients",
            f"{at} the gradient of {flat_share:.0%} of the images was zero in every pixel at some "
            "step.",
            "The encoder rounds, compares or saturates: attacks by gradients stay where they are.",
            "Replace rounding by its identity in the backward pass, and go by Square's numbers.",
        )
    if "square" in members:
        reached = far[:, by_gradient].max((1, 2))
        more = far[:, members.index("square")].max(1) > _SQUARE_MORE * reached
        if more.mean() > _SQUARE_ON:
            yield _doubt(
                "masked gradients",
                f"{at} Square, which needs no gradient, moves {more.mean():.0%} of the images "
                "farther than APGD does.",
                "The encoder's gradients do not lead where its representations move.",
                "Look for rounding, saturation and stop_gradient; give Square a larger budget.",
            )
    farthest = far[:, 0].argmax(1)
    grows = float(np.median(growth[np.arange(len(far)), 0, farthest]))
    if grows > _GROWS:
        yield _doubt(
            "still growing",
            f"{at} the median distance grew by {grows:.1%} in the last quarter of the budget.",
            "More steps would find more.",
            f"Repeat with --strong-steps {4 * config.strong_steps}.",
        )
    if config.strong_restarts > 1:
        starts = far[:, 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.median((starts.max(1) - starts.min(1)) / starts.max(1))
        if spread > _STARTS:
            yield _doubt(
                "starts differ",
                f"{at} the starts of APGD end {spread:.0%} apart on the median image.",
                "The encoder has many local maxima: no start is near the strongest attack.",
                f"Repeat with --strong-restarts {4 * config.strong_restarts}.",
            )


def _doubt(name: str, seen: str, cause: str, remedy: str) -> Doubt:
    return {"name": name, "seen": seen, "cause": cause, "remedy": remedy}
