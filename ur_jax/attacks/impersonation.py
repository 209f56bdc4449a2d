"""Targeted attacks without labels, read at several steps on their way: impersonation.

Reference: Petrov & Kwiatkowska 2022 (arXiv:2210.04076), section 5.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from ur_jax.attacks import OBJECTIVES, RULES, AttackConfig, random_start, u_pgd
from ur_jax.checks import check_whole
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.typed import check_types
from ur_jax.types import Array


@dataclasses.dataclass(frozen=True)
class ImpersonationConfig:
    """The attack; the defaults are the paper's.

    Attributes:
      eps: radius of the ball, pixel units, > 0.
      step_size: of targeted U-PGD, > 0; of rules that do not choose their own.
      rule, objective, norm, num_restarts: as in `AttackConfig`. With a rule that keeps its best
        point, or with restarts, every reading is an attack of its own with as many steps from the
        same start, since such a rule's steps depend on their number.
      read_at: steps at which success is read, increasing, >= 1.
      moving_ball: restart the attack around the already attacked image at each read-out, as the
        published code does (departure 3): the whole perturbation can exceed eps.
      num_images: attacked at most in each direction, evenly spaced among those that the probe
        classifies correctly; None for all.
      batch_size: images per batch, over all devices, >= 1.
      seed: of the random starts and of the pairs.

    Raises:
      UserError: for a value out of range.
    """

    eps: float = 0.10
    step_size: float = 0.01
    rule: str = "fixed"
    objective: str = "l2"
    norm: str = "linf"
    num_restarts: int = 1
    read_at: tuple[int, ...] = (3, 5, 10, 20, 30, 40, 50)
    moving_ball: bool = False
    num_images: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        steps = (0, *self.read_at)
        if not self.read_at or any(b <= a for a, b in zip(steps, steps[1:])):
            raise UserError(f"Expected increasing read_at, from 1 on, got {self.read_at}.")
        check_whole(self, "num_images", optional=True)
        check_whole(self, "batch_size")
        check_whole(self, "seed", least=0)
        if getattr(OBJECTIVES[self.objective](), "needs_bank", False):
            raise UserError(
                f"Expected an objective with a target to impersonate, got {self.objective!r}; "
                "choose l2 or cosine."
            )
        self.of_steps(1)
        if self.moving_ball and self.is_read_apart:
            raise UserError(
                "Expected the rule fixed and one start with a moving ball, which is the published "
                f"code's, got {self.rule} and {self.num_restarts}."
            )

    def of_steps(self, num_steps: int) -> AttackConfig:
        """The attack of so many steps."""
        return AttackConfig(
            self.eps, self.step_size, num_steps, self.norm,
            num_restarts=self.num_restarts, rule=self.rule, objective=self.objective,
        )  # fmt: skip

    @property
    def is_read_apart(self) -> bool:
        """Whether every reading is an attack of its own."""
        return self.num_restarts > 1 or RULES[self.rule]().keeps_best


def attack(
    encoder: Encoder, images: Array, keys: Array, target: Array, *, config: ImpersonationConfig
) -> Iterator[Array]:
    """Targeted U-PGD, read at several steps: one run in one ball around the originals.

    (Or, see `ImpersonationConfig.rule`, a run for each reading.)

    The steps after the random start are those of `u_pgd` with as many; reading it changes nothing.
    With `moving_ball`, every stretch between two readings is an attack of its own, with its own
    random start, around the image that the last one left.

    Args:
      encoder: the encoder that is attacked.
      images: originals (B,H,W,3) float32 in [0,1].
      keys: a key per image (B,).
      target: representations (B,D) to move towards.
      config: the attack; one compilation for all readings.

    Yields:
      The attacked images (B,H,W,3) at each of `config.read_at`.
    """
    if config.is_read_apart:
        for step in config.read_at:
            yield u_pgd(encoder, images, keys, config=config.of_steps(step), target=target).images
        return
    attacked, done = images, 0
    for number, step in enumerate(config.read_at):
        centre = attacked if config.moving_ball else images
        fresh = config.moving_ball or number == 0
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number) if number else keys
        attacked = _advance(
            encoder, centre, attacked, own, target, fresh, step - done, config.of_steps(1)
        )
        done = step
        yield attacked


@functools.partial(jax.jit, static_argnames="config")
def _advance(encoder, centre, attacked, keys, target, fresh, num_steps, config) -> Array:
    """`num_steps` further steps in the ball around `centre`, from a random start if `fresh`."""
    attacked = jnp.where(fresh, random_start(centre, keys, config=config), attacked)

    # What `u_pgd` records of a step is not used, and the compiler removes it.
    def step(_, x):
        return u_pgd(encoder, centre, keys, config=config, target=target, start=x).images

    return jax.lax.fori_loop(0, num_steps, step, attacked)
