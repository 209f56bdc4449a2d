"""The strongest that is found: the worst of a fixed list of attacks, image by image.

The counterpart for encoders of AutoAttack (Croce & Hein 2020). Every member is `u_pgd` with another
rule, objective or aim, so that each can be run alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ur_jax.attacks.ball import image_keys
from ur_jax.attacks.config import AttackConfig
from ur_jax.attacks.unsupervised import u_pgd
from ur_jax.checks import check_finite_array, check_type, check_whole
from ur_jax.distances import distance
from ur_jax.encoders.base import Encoder, check_images
from ur_jax.errors import UserError
from ur_jax.typed import check_types
from ur_jax.types import AnyArray, Array, Images, Keys

QUERIES_PER_STEP = 10
"""Of Square, for each gradient step of the others: about three times their cost."""

_MEMBERS: dict[str, dict[str, Any]] = {
    "apgd-l2": {"rule": "apgd"},
    "apgd-cosine": {"rule": "apgd", "objective": "cosine"},
    "apgd-targeted": {"rule": "apgd"},
    "square": {"rule": "square"},
    "apgd-neighbour": {"rule": "apgd", "objective": "neighbour"},
}
_TARGETED = ("apgd-targeted",)
_WITH_BANK = ("apgd-neighbour",)
_LINF_ONLY = ("square",)
_LATE = 0.75  # of the budget: what is gained after it tells whether more would help


@dataclasses.dataclass(frozen=True)
class StrongConfig:
    """Settings of `strong`.

    Attributes:
      eps: radius of the ball in pixel units, > 0; for linf also <= 1.
      budget: gradient steps of each start, >= 1; Square has 10 queries for each.
      num_restarts: starts of each member, >= 1.
      norm: "linf", "l2" or "l1"; Square is left out of the last two.
      with_bank: whether there is a bank of clean representations: then APGD on the nearest
        neighbour (`objectives.Neighbour`) is a member too.

    Raises:
      UserError: for a value out of range.
    """

    eps: float = 0.05
    budget: int = 50
    num_restarts: int = 3
    norm: str = "linf"
    with_bank: bool = False

    def __post_init__(self):
        check_types(self)
        check_whole(self, "budget", "num_restarts")
        _ = self.members  # raises for a radius or norm that is none

    @property
    def members(self) -> dict[str, AttackConfig]:
        """{name: one start of it}, in order."""
        steps = lambda name: self.budget * (QUERIES_PER_STEP if name == "square" else 1)
        return {
            name: AttackConfig(self.eps, self.eps, steps(name), self.norm, **settings)
            for name, settings in _MEMBERS.items()
            if (self.norm == "linf" or name not in _LINF_ONLY)
            and (self.with_bank or name not in _WITH_BANK)
        }

    @property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """(member, start) of each run, in the order of the results."""
        return tuple((name, start) for name in self.members for start in range(self.num_restarts))

    @property
    def forward_passes(self) -> int:
        """Of each image, a gradient step counted as 3."""
        each = {name: 1 if name == "square" else 3 for name in self.members}
        steps = sum(each[name] * (c.num_steps + 1) for name, c in self.members.items())
        return self.num_restarts * steps


class StrongResult(NamedTuple):
    """What every run found, and the farthest of them; R runs in the order of `StrongConfig.runs`.

    Attributes:
      images: (B,H,W,3) float32, the farthest attacked images, in the ball and in [0,1].
      representations: (B,D) float32, of these.
      distance: (B,) float32, their l2 distance to the clean representation; infinite for a
        representation that is NaN or infinite.
      run: (B,) int32, which run found them.
      distances: (B,R) float32, of all runs.
      each: (B,R,D) float32, the representations of all runs.
      clean: (B,D) float32.
      zero_gradients: (B,R) int32, steps without a gradient.
      bad_gradients: (B,R) int32, entries of gradients that were NaN or infinite.
      growth: (B,R) float32, by what share the objective's distance grew in the last quarter of the
        budget; of a targeted run, by what share it shrank.
    """

    images: Array
    representations: Array
    distance: Array
    run: Array
    distances: Array
    each: Array
    clean: Array
    zero_gradients: Array
    bad_gradients: Array
    growth: Array


def strong(
    encoder: Encoder,
    images: Images,
    key: Keys,
    *,
    config: StrongConfig,
    targets: AnyArray | None = None,
    bank: AnyArray | None = None,
) -> StrongResult:
    """The farthest that APGD (l2, cosine, targeted) and Square move each representation.

    Args:
      encoder: the encoder f.
      images: originals (B,H,W,3) float32 in [0,1].
      key: one typed key, or a key per image (B,), as in `u_pgd`.
      config: the budget.
      targets: (num_restarts,B,D) float32, representations that the targeted runs move towards, one
        for each start; by default those of the batch's next images, which then has to have two.
      bank: clean representations (N,D) float32, if `config.with_bank`.

    Returns:
      The farthest images, and what each run found: the distance is that of the best run on every
      image, so no member finds more. It is a lower bound of what an attacker can reach, no upper
      one.

    Raises:
      UserError: as `u_pgd`, or for targets of another shape.
    """
    check_type("encoder", encoder, Encoder)
    check_type("config", config, StrongConfig)
    check_images(encoder, images)
    keys, clean = image_keys(key, len(images)), _represent(encoder, jnp.asarray(images))
    if targets is None:
        if len(images) < 2:
            raise UserError("Expected targets (num_restarts,1,D) with a single image, got none.")
        targets = jnp.stack([
            jnp.roll(clean, -1 - start % (len(images) - 1), axis=0)
            for start in range(config.num_restarts)
        ])  # fmt: skip
    check_finite_array("targets", targets, (config.num_restarts, *clean.shape))
    if (bank is not None) != config.with_bank:
        raise UserError(f"Expected a bank if with_bank, got {bank is not None} and not so.")
    found, best = [], None
    for number, (name, start) in enumerate(config.runs):
        attack, place = config.members[name], list(config.members).index(name)
        target = targets[start] if name in _TARGETED else None
        own = _folded(keys, place, start)
        near = bank if name in _WITH_BANK else None
        result = u_pgd(encoder, images, own, config=attack, target=target, bank=near)
        run = _measured(clean, result, is_cosine=attack.objective == "cosine")
        best = _farther(number, run, result, best)
        found.append(run)
    assert best is not None
    farthest, representations, far, number = best
    distances, each, zero, bad, growth = (jnp.stack(values, axis=1) for values in zip(*found))
    return StrongResult(
        farthest, representations, far, number, distances, each, clean, zero, bad, growth
    )


@jax.jit
def _represent(encoder, images):
    """The encoder, compiled."""
    return encoder(images)


@jax.jit
def _folded(keys, place, start):
    """The keys of a member's start."""
    fold = jax.vmap(jax.random.fold_in, (0, None))
    return fold(fold(keys, place), start)


@functools.partial(jax.jit, static_argnames="is_cosine")
def _measured(clean, result, is_cosine):
    """Of a run: distances, representations, gradients that were none, growth; (B, ...) each."""
    far = distance(result.representations, clean, divergence="l2")
    far = jnp.where(jnp.all(jnp.isfinite(result.representations), axis=1), far, jnp.inf)
    best = result.history.best
    reached = 1.0 - best.cosine_similarity if is_cosine else best.l2
    late = reached[:, int(_LATE * reached.shape[1])]
    last = reached[:, -1]
    growth = jnp.abs(last - late) / jnp.where(late == 0.0, 1.0, late)
    health = result.health
    return far, result.representations, health.zero_gradients, health.bad_gradients, growth


@jax.jit
def _farther(number, run, result, best):
    """The farthest so far: images, representations, distance, run."""
    far, representations, *_ = run
    new = result.images, representations, far, jnp.full(far.shape, number, jnp.int32)
    if best is None:
        return new
    chosen = far > best[2]
    choose = lambda new, old: jnp.where(chosen.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return jax.tree.map(choose, new, best)
