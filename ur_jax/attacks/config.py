"""The settings of an attack, and which of them are traced."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from ur_jax.attacks.ball import NORMS, UNIT, check_norm
from ur_jax.attacks.objectives import OBJECTIVES
from ur_jax.attacks.rules import RULES
from ur_jax.checks import check_flag, check_number, check_whole
from ur_jax.errors import UserError
from ur_jax.typed import check_types
from ur_jax.types import Images

_LEAST = 2.0**-24
_LEAST_UNIT = f"{UNIT}, below which float32 pixels do not move"


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """Settings of a projected-gradient attack; the defaults are the paper's U-PGD.

    Attributes:
      eps: radius of the ball in pixel units, > 0; for linf also <= 1.
      step_size: length of a step in the same norm, as `eps`; rules that choose their own
        (`apgd`, `square`) do not use it.
      num_steps: number of steps, >= 1; of `square`, of queries.
      norm: one of `NORMS`.
      random_start: start uniformly in the ball rather than at the image.
      num_restarts: independent runs, of which each image keeps its worst, >= 1.
      rule: how a gradient becomes a step, a name of `RULES`.
      objective: what is maximised, a name of `OBJECTIVES`.

    Raises:
      ValueError: for a value out of range.
    """

    eps: float = 0.05
    step_size: float = 0.001
    num_steps: int = 55
    norm: str = "linf"
    random_start: bool = True
    num_restarts: int = 1
    rule: str = "fixed"
    objective: str = "l2"

    def __post_init__(self):
        check_types(self)
        check_norm(self.norm)
        # No two pixels differ by more than 1: a larger radius was meant for pixels of 0 to 255.
        most = 1.0 if self.norm == "linf" else math.inf
        check_number(self, "eps", "step_size", above=0.0, most=most, unit=UNIT)
        check_number(self, "eps", "step_size", least=_LEAST, unit=_LEAST_UNIT)
        check_whole(self, "num_steps", "num_restarts")
        check_flag(self, "random_start")
        if self.num_restarts > 1 and not self.random_start:
            raise UserError(
                f"Expected a random start with num_restarts={self.num_restarts}: without one, "
                "all restarts are the same run. Set random_start=True or num_restarts=1."
            )
        norms = getattr(RULES[self.rule](), "norms", NORMS)  # raises for an unknown name
        if self.norm not in norms:
            raise UserError(
                f"Expected norm {' or '.join(norms)} with the step rule {self.rule!r}, got "
                f"{self.norm!r}; choose another rule."
            )
        OBJECTIVES[self.objective]  # the same


def fgsm_config(eps: float, norm: str = "linf") -> AttackConfig:
    """Returns the config of FGSM: one step of size `eps`."""
    return AttackConfig(eps=eps, step_size=eps, num_steps=1, norm=norm)


def check_radius(config: AttackConfig, images: Images) -> None:
    """Refuses a ball that holds every picture."""
    pixels = math.prod(images.shape[1:])
    diagonal = {"linf": 1.0, "l2": math.sqrt(pixels), "l1": float(pixels)}[config.norm]
    if config.eps > diagonal:
        raise UserError(
            f"Expected eps <= {diagonal:.4g} in {config.norm}, the largest distance between two "
            f"images of {images.shape[1]} x {images.shape[2]} pixels in [0,1], got {config.eps:g}."
        )


class Size(NamedTuple):
    """The numbers of a config that are traced, so that a sweep over them compiles once."""

    eps: float
    step_size: float


def split(config: AttackConfig) -> tuple[Size, AttackConfig]:
    """The traced numbers of a config, and the rest of it, which is static."""
    rest = dataclasses.replace(config, eps=1.0, step_size=1.0)
    return Size(config.eps, config.step_size), rest
