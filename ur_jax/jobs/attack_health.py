"""What went wrong inside a job's attacks: no gradient, a bad one, a representation that is lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from ur_jax.attacks import AttackConfig, AttackResult
from ur_jax.metrics.checks import in_range
from ur_jax.runs import Run

_MUCH = 0.01  # of an attack's steps, without a gradient


def columns(result: AttackResult, attack: AttackConfig) -> dict[str, Any]:
    """What an attack could not go by, per image, and whether its representation was lost."""
    lost = ~in_range(result.representations)
    num_steps = attack.num_steps * attack.num_restarts
    zero = result.health.zero_gradients.astype(jnp.float32) / num_steps
    health = {name: getattr(result.health, name) for name in ("bad_gradients", "nan_ends")}
    return {"zero_gradients": zero, **health, "lost": lost}


def measured(run: Run, stages: Iterable[str]) -> dict[str, dict[str, float]]:
    """{stage: share of steps without gradient, images with bad entries, images lost, images}."""
    found = {}
    for stage in stages:
        part = run.read_parts(stage)
        if "lost" in part:
            found[stage] = {
                "zero_gradient_share": float(part["zero_gradients"].mean()),
                "bad_gradients": int((part["bad_gradients"] > 0).sum()),
                "lost": int(part["lost"].sum()),
                "nan_ends": int(part["nan_ends"].sum()) if "nan_ends" in part else 0,
                "n": len(part["lost"]),
            }
    return found


def remarks(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Sentences on what went wrong inside attacks; none where nothing did."""
    for stage, counts in found.items():
        n = counts["n"]
        if counts["zero_gradient_share"] > _MUCH:
            yield (
                f"{stage}: at {counts['zero_gradient_share']:.0%} of the steps the gradient was "
                "zero in every pixel, and nothing moved. Does the encoder round, compare or "
                "saturate? Its distances are then those of the random start, not of an attack."
            )
        if counts["bad_gradients"]:
            yield (
                f"{stage}: the gradients of {counts['bad_gradients']} of {n} images had NaN or "
                "infinite entries; the attack did without them."
            )
        if counts.get("nan_ends", 0) > counts["lost"]:  # of several restarts
            yield (
                f"{stage}: {counts['nan_ends']} restarts of {n} images ended where the objective "
                "is NaN; each image keeps the best of its others, if there is one."
            )
        if counts["lost"]:
            yield (
                f"{stage}: {counts['lost']} of {n} attacked images have representations that are "
                "NaN or infinite; they count as the worst."
            )
