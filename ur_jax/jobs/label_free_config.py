"""The settings of the label-free protocol, and which of them each stage depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ur_jax.attacks import OBJECTIVES, AttackConfig, StrongConfig
from ur_jax.checks import check_distinct, check_whole
from ur_jax.errors import UserError
from ur_jax.typed import check_types

PAPER = ("distances", "attacks", "overlap", "breakaway")
"""The paper's stages."""

STAGES = (*PAPER, "strongest")
"""What can be evaluated on its own; all but overlap need the clean representations of the bank."""

_BANK = ("num_clean", "num_distribution")
_ATTACK = ("step_size", "rule", "norm", "num_restarts", "objective")
_SETTINGS = {
    "distances": _BANK,
    "attacks": (*_BANK, "num_images", "eps", "read_at", "nearest_level", *_ATTACK),
    "overlap": ("num_images", "overlap_eps", "overlap_steps", *_ATTACK),
    "breakaway": ("num_clean", "num_images", "breakaway_eps", "breakaway_steps", *_ATTACK),
    "strongest": (*_BANK, "num_images", "norm", "strong_eps", "strong_steps", "strong_restarts"),
}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The label-free protocol; the defaults are the paper's.

    Attributes:
      num_images: images attacked, and pairs of the overlap risk (at most half of all images).
      num_clean: images of the bank that breakaway risk and neighbours look in; None for all.
      num_distribution: images of the distance distribution, a subset of the bank; None for all.
      eps: radii of the attacks, pixel units.
      step_size: of every attack whose rule does not choose its own.
      rule: how a gradient becomes a step in every attack, a name of `attacks.RULES`. All but
        `fixed` are read at the best point until a step.
      norm: of every attack, linf, l2 or l1.
      num_restarts: independent runs of every attack, of which each image keeps its worst.
      objective: what every attack maximises, a name of `attacks.OBJECTIVES`.
      read_at: steps at which attacks are read.
      overlap_eps, overlap_steps: the attacks on pairs.
      breakaway_eps, breakaway_steps: the attack of breakaway risk and neighbour accuracy.
      strong_eps: radii of the strongest that is found, the worst of `attacks.strong` on each image.
      strong_steps: gradient steps of each of its starts; Square has 10 queries for each.
      strong_restarts: starts of each of its attacks.
      batch_size: images per batch, over all devices of a host; None where a script is to find the
        largest that fits, see `fit_batch_size`.
      nearest_level: distances become quantiles by the nearest stored level, as in the authors'
        code (departure 8), instead of by the exact distribution.
      seed: of every random draw.

    Raises:
      ValueError: for a value out of range.
    """

    num_images: int = 1000
    num_clean: int | None = None
    num_distribution: int | None = 100_000
    eps: tuple[float, ...] = (0.05, 0.10)
    step_size: float = 0.001
    rule: str = "fixed"
    norm: str = "linf"
    num_restarts: int = 1
    objective: str = "l2"
    read_at: tuple[int, ...] = (5, 10, 30, 50)
    overlap_eps: float = 0.05
    overlap_steps: int = 10
    breakaway_eps: float = 0.05
    breakaway_steps: int = 25
    strong_eps: tuple[float, ...] = (0.05,)
    strong_steps: int = 50
    strong_restarts: int = 3
    batch_size: int | None = 64
    nearest_level: bool = False
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        check_whole(self, "overlap_steps", "breakaway_steps", "strong_steps", "strong_restarts")
        check_distinct(self, "eps", "read_at", "strong_eps")
        if not self.eps or not self.read_at or min(self.read_at) < 1:
            raise UserError(
                f"Expected at least one eps and steps read_at >= 1, got {self.eps}, {self.read_at}."
            )
        for field in ("num_images", "num_clean", "num_distribution", "batch_size"):
            value = getattr(self, field)
            if value is not None and value < 2:
                raise UserError(f"Expected {field} >= 2, got {value}.")
        for eps in (*self.eps, self.overlap_eps, self.breakaway_eps):
            self.attack(eps, 1)
        for eps in (*self.strong_eps, self.eps[0]):
            self.strong(eps)

    def of_stages(self, stages: Sequence[str]) -> dict[str, Any]:
        """The settings that the results of some stages depend on, {field: value}."""
        names = {"seed", "batch_size"}.union(*(_SETTINGS[stage] for stage in stages))
        return {k: v for k, v in dataclasses.asdict(self).items() if k in names}

    def attack(self, eps: float, num_steps: int) -> AttackConfig:
        """The U-PGD of these settings."""
        return AttackConfig(
            eps, self.step_size, num_steps, self.norm,
            num_restarts=self.num_restarts, rule=self.rule, objective=self.objective,
        )  # fmt: skip

    def strong(self, eps: float) -> StrongConfig:
        """The attacks whose worst is the strongest that is found."""
        return StrongConfig(eps, self.strong_steps, self.strong_restarts, self.norm, with_bank=True)

    @property
    def needs_bank(self) -> bool:
        """Whether the objective looks at the neighbours in the bank."""
        return getattr(OBJECTIVES[self.objective](), "needs_bank", False)


_QUICK = EvaluationConfig(num_images=64, read_at=(5, 10, 20), num_distribution=None)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {"protocol": _QUICK},
    "strong": {
        "stages": STAGES,
        "protocol": dataclasses.replace(_QUICK, read_at=(5, 10, 30, 50)),
    },
    # More than the paper's 50 steps find, in 8: see attacks/README.md.
    "fast": {
        "protocol": dataclasses.replace(
            _QUICK, rule="apgd", read_at=(8,), overlap_steps=8, breakaway_steps=8
        )
    },
}
"""Fields of the job `evaluate`, by preset; the first is the default."""
