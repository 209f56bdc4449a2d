"""Unsupervised attacks, U-PGD and U-FGSM: representations are moved away, or towards a target."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax

from ur_jax.attacks.ascent import Health, ascend, best_until, start_of
from ur_jax.attacks.ball import Ball, image_keys
from ur_jax.attacks.config import AttackConfig, check_radius, fgsm_config, split
from ur_jax.attacks.objectives import OBJECTIVES, Aim
from ur_jax.checks import check_finite_array, check_pixels, check_type
from ur_jax.distances import Distances, all_distances
from ur_jax.encoders.base import Encoder, check_images
from ur_jax.errors import UserError
from ur_jax.types import Array, Images, Keys, OnDevice, Representations, Rows


class AttackHistory(NamedTuple):
    """What an attack records, each (B,T): entry t is distances BEFORE step t, norms AFTER step t.

    So entry 0 of the distances belongs to the start, "at t steps" is entry t of a run of more than
    t steps. They are those of the present point, whether the rule keeps it or not; `best` has those
    of the best point until each step. Perturbation norms are in pixel units, over all H*W*3 values.
    Of several restarts, the history is that of the one whose end each image keeps.
    """

    dist_l1: Array
    dist_l2: Array
    dist_linf: Array
    cosine_similarity: Array
    perturb_l1: Array
    perturb_l2: Array
    perturb_linf: Array
    objective: Array

    @property
    def best(self) -> Distances:
        """Distances (B,T) at the point of the largest objective until each step, BEFORE it."""
        present = Distances(*self[:4])
        return Distances(*(best_until(self.objective, values) for values in present))


class AttackResult(NamedTuple):
    """Attacked images and how the attack went.

    Attributes:
      images: (B,H,W,3) float32, in the ball around the originals and in [0,1].
      representations: (B,D) float32, of the attacked images.
      objective: (B,) float32, what was maximised, at the attacked images.
      history: what was recorded on the way.
      health: zero, NaN and infinite gradients and ends, counted.
    """

    images: Array
    representations: Array
    objective: Array
    history: AttackHistory
    health: Health


def u_pgd(
    encoder: Encoder,
    images: Images,
    key: Keys,
    *,
    config: AttackConfig,
    target: Representations | None = None,
    start: Images | None = None,
    bank: Rows | None = None,
) -> AttackResult:
    """Unsupervised PGD: moves representations away from their own, or towards a target.

      untargeted: maximise |f(x + delta) - f(x)|^2      targeted: minimise |f(x + delta) - target|^2

    The squared l2 distance has the same direction of gradient as l2 and is differentiable at 0.
    `config.objective` names another measure, `config.rule` other steps: `apgd` finds more at the
    same cost, `square` needs no gradient.

    Args:
      encoder: the encoder f.
      images: originals (B,H,W,3) float32 in [0,1].
      key: one typed key, of which image i uses fold_in(key, i), or a key per image (B,), with which
        the result does not depend on how images are batched.
      config: the attack; eps and step size are traced, the rest is static.
      target: representations (B,D) float32 to move towards; untargeted if left out.
      start: where to start (B,H,W,3) instead of at random; taken as it is, even outside the ball.
      bank: clean representations (N,D) float32, for objectives that look at neighbours.

    Returns:
      Attacked images, their representations, and the history of distances to f(x) or the target.
      They are those of the last point by the rule `fixed`, by all others of the best point seen.
      The images are finite and inside the ball whatever the encoder's gradients are; the
      representations of an encoder that is NaN or infinite there are so too.

    Raises:
      UserError: for images that are not of the encoder's size, dtype or range, a target or start
        of another shape or not finite, a key that is not typed, a ball that holds every image, or
        an untargeted attack without random start: its gradient at delta = 0 is zero.

    Reference:
      Petrov & Kwiatkowska 2022, section 3.1. Differs from their code in computing no gradient of
      the weights (departure 7).
    """
    check_type("encoder", encoder, Encoder)
    check_type("config", config, AttackConfig)
    check_images(encoder, images)
    check_radius(config, images)
    if start is not None:
        check_finite_array("start", start, images.shape)
        if config.num_restarts > 1:
            raise UserError(
                f"Expected num_restarts=1 with a start, got {config.num_restarts}: all restarts "
                "would be the same run."
            )
    elif target is None and not config.random_start:
        raise UserError(
            "Expected random_start=True for an untargeted attack, got False: at the original image "
            "the gradient of the distance to itself is exactly zero, and nothing would move."
        )
    if (bank is not None) != getattr(OBJECTIVES[config.objective](), "needs_bank", False):
        raise UserError(
            f"Expected {'no ' * (bank is not None)}bank of clean representations with the "
            f"objective {config.objective!r}."
        )
    if bank is not None:
        check_finite_array("bank", bank, (len(bank), encoder.dimension))
    if target is not None:
        shape = (len(images), encoder.dimension)
        check_finite_array("target", target, shape)
    keys = image_keys(key, len(images))
    return _u_pgd(encoder, images, keys, target, start, *split(config), bank)


def u_fgsm(
    encoder: Encoder,
    images: Images,
    key: Keys,
    *,
    eps: float,
    norm: str = "linf",
    target: Representations | None = None,
) -> AttackResult:
    """Unsupervised FGSM: `u_pgd` in one step of size `eps`; arguments and errors as there."""
    return u_pgd(encoder, images, key, config=fgsm_config(eps, norm), target=target)


def random_start(images: Images, key: Keys, *, config: AttackConfig) -> OnDevice:
    """Returns where `u_pgd` with the same arguments starts, to go on from by its `start`.

    Args:
      images: originals (B,H,W,3) float32 in [0,1].
      key: as in `u_pgd`.
      config: the attack; the originals are returned if it has no random start.

    Raises:
      UserError: as `u_pgd`.
    """
    check_type("config", config, AttackConfig)
    check_pixels(images)
    check_radius(config, images)
    ball = Ball(images, config.eps, config.norm)
    return start_of(ball, image_keys(key, len(images)), config)


@functools.partial(jax.jit, static_argnames="config")
def _u_pgd(encoder, images, keys, target, start, size, config, bank=None) -> AttackResult:
    """`u_pgd` without the checks."""
    reference = jax.lax.stop_gradient(encoder(images) if target is None else target)
    aim, objective_of = Aim(reference, target is not None, bank), OBJECTIVES[config.objective]()

    def objective_fn(attacked, draws):
        representations = encoder(attacked)
        return objective_of(representations, aim), representations

    def record_fn(representations):
        return all_distances(representations, reference)

    end = ascend(objective_fn, record_fn, images, keys, size, config, start)
    history = AttackHistory._make((*end.records, *end.norms, end.objectives))
    return AttackResult(end.images, end.output, end.objective, history, end.health)
