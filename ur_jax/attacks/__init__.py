"""Unsupervised attacks: U-FGSM, U-PGD and L-PGD, over one projected-gradient core.

Every attack is random start -> gradient -> step -> project, and returns images; it changes nothing
else. A norm changes three small functions, an attack changes the objective. Gradients are with
respect to the images only.

Images must lie in [0,1]. The result lies in the ball around the ORIGINAL image and in [0,1], to one
float32 ulp.

Reference: Petrov & Kwiatkowska 2022, "Robustness of Unsupervised Representation Learning without
Labels" (arXiv:2210.04076), section 3; Madry et al. 2018 for PGD.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ur_jax.distances import all_distances
from ur_jax.encoders.base import Encoder, check_images
from ur_jax.errors import UserError, unknown_name
from ur_jax.types import Array, Key, PyTree

NORMS = ("linf", "l2")

# The float32 norm of a perturbation is off by less than this share of itself.
_NORM_MARGIN = 2.0**-18


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """Settings of a projected-gradient attack; the defaults are the paper's U-PGD.

    Attributes:
      eps: radius of the ball in pixel units, > 0.
      step_size: length of a step in the same norm, > 0.
      num_steps: number of steps, >= 1.
      norm: "linf" or "l2".
      random_start: start uniformly in the ball rather than at the image.
      num_restarts: independent runs, of which each image keeps its worst, >= 1.

    Raises:
      ValueError: for a value out of range.
    """

    eps: float = 0.05
    step_size: float = 0.001
    num_steps: int = 55
    norm: str = "linf"
    random_start: bool = True
    num_restarts: int = 1

    def __post_init__(self):
        for field in ("eps", "step_size"):
            value = getattr(self, field)
            if not 0.0 < value < float("inf"):
                raise UserError(f"Expected {field} > 0, in pixel units of [0,1], got {value}.")
        for field in ("num_steps", "num_restarts"):
            value = getattr(self, field)
            if value < 1:
                raise UserError(f"Expected {field} >= 1, got {value}.")
        if self.norm not in NORMS:
            raise unknown_name("norm", self.norm, NORMS)
        if self.num_restarts > 1 and not self.random_start:
            raise UserError(
                f"Expected a random start with num_restarts={self.num_restarts}: without one, "
                "all restarts are the same run. Set random_start=True or num_restarts=1."
            )


def fgsm_config(eps: float, norm: str = "linf") -> AttackConfig:
    """Returns the config of FGSM: one step of size `eps`."""
    return AttackConfig(eps=eps, step_size=eps, num_steps=1, norm=norm)


class AttackHistory(NamedTuple):
    """What an attack records, each (B,T): entry t is distances BEFORE step t, norms AFTER step t.

    So entry 0 of the distances belongs to the start, "at t steps" is entry t of a run of more than
    t steps, and the distances after the last step are those of the result's representations.
    Perturbation norms are in pixel units, over all H*W*3 values.
    """

    dist_l1: Array
    dist_l2: Array
    dist_linf: Array
    cosine_similarity: Array
    perturb_l1: Array
    perturb_l2: Array
    perturb_linf: Array


class AttackResult(NamedTuple):
    """Attacked images and how the attack went.

    Attributes:
      images: (B,H,W,3) float32, in the ball around the originals and in [0,1].
      representations: (B,D) float32, of the attacked images.
      objective: (B,) float32, what was maximised, at the attacked images.
      history: what was recorded on the way.
    """

    images: Array
    representations: Array
    objective: Array
    history: AttackHistory


class LossAttackResult(NamedTuple):
    """Attacked images (B,H,W,3), their losses (B,), and the losses before each step (B,T)."""

    images: Array
    loss: Array
    history: Array


def u_pgd(
    encoder: Encoder,
    images: Array,
    key: Key,
    *,
    config: AttackConfig,
    target: Array | None = None,
    start: Array | None = None,
) -> AttackResult:
    """Unsupervised PGD: moves representations away from their own, or towards a target.

      untargeted: maximise |f(x + delta) - f(x)|^2      targeted: minimise |f(x + delta) - target|^2

    The squared l2 distance has the same direction of gradient as l2 and is differentiable at 0.

    Args:
      encoder: the encoder f.
      images: originals (B,H,W,3) float32 in [0,1].
      key: one typed key, of which image i uses fold_in(key, i), or a key per image (B,), with which
        the result does not depend on how images are batched.
      config: the attack; eps and step size are traced, the rest is static.
      target: representations (B,D) float32 to move towards; untargeted if left out.
      start: where to start (B,H,W,3) instead of at random; taken as it is, even outside the ball.

    Returns:
      Attacked images, their representations, and the history of distances to f(x) or the target.

    Raises:
      ValueError: for images that are not of the encoder's size, dtype or range, a target of another
        shape, or an untargeted attack without random start: its gradient at delta = 0 is zero.

    Reference:
      Petrov & Kwiatkowska 2022, section 3.1. Differs from their code in computing no gradient of
      the weights (departure 7).
    """
    check_images(encoder, images)
    if start is not None and (start.shape != images.shape or config.num_restarts > 1):
        raise UserError(
            f"Expected start of shape {tuple(images.shape)} and num_restarts=1, got "
            f"{tuple(start.shape)} and {config.num_restarts}."
        )
    if target is None and start is None and not config.random_start:
        raise UserError(
            "Expected random_start=True for an untargeted attack, got False: at the original image "
            "the gradient of the distance to itself is exactly zero, and nothing would move."
        )
    if target is not None and target.shape != (len(images), encoder.dimension):
        raise UserError(
            f"Expected target representations ({len(images)},{encoder.dimension}), one for each "
            f"image, got {tuple(target.shape)}."
        )
    keys = image_keys(key, len(images))
    return _u_pgd(encoder, images, keys, target, start, *_split(config))


def u_fgsm(
    encoder: Encoder,
    images: Array,
    key: Key,
    *,
    eps: float,
    norm: str = "linf",
    target: Array | None = None,
) -> AttackResult:
    """Unsupervised FGSM: `u_pgd` in one step of size `eps`; arguments and errors as there."""
    return u_pgd(encoder, images, key, config=fgsm_config(eps, norm), target=target)


def loss_pgd(
    loss_fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    images: Array,
    key: Key,
    *,
    config: AttackConfig,
) -> LossAttackResult:
    """L-PGD: maximises a per-image loss, such as the encoder's own self-supervised one.

    Args:
      loss_fn: pure and jittable, (params, images (B,H,W,3)) -> losses (B,) float32. It is compared
        by identity: a fresh lambda per call recompiles.
      params: what the loss takes beside the images (weights, keys, queue, ...), any pytree. It is
        read and never changed; no gradient with respect to it is computed.
      images: originals (B,H,W,3) float32 in [0,1].
      key: as in `u_pgd`.
      config: as in `u_pgd`. L-FGSM is `fgsm_config(eps)`.

    Returns:
      Attacked images, their losses, and the loss before each step.

    Reference:
      Petrov & Kwiatkowska 2022, section 3.1. Unlike their MoCo v2 code, attacking moves neither
      queue nor key encoder (departure 4).
    """
    return _loss_pgd(loss_fn, params, images, image_keys(key, len(images)), *_split(config))


def random_start(images: Array, key: Key, *, config: AttackConfig) -> Array:
    """Returns where `u_pgd` with the same arguments starts, to go on from by its `start`.

    Args:
      images: originals (B,H,W,3) float32 in [0,1].
      key: as in `u_pgd`.
      config: the attack; the originals are returned if it has no random start.
    """
    return _start(images, image_keys(key, len(images)), config.eps, config)


def image_keys(key: Key, num_images: int) -> Array:
    """Returns a key per image: `key` folded with 0, 1, ..., or `key` itself if it is (B,) keys."""
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_images))
    if key.shape != (num_images,):
        raise UserError(
            f"Expected one key, or one for each of {num_images} images, got {key.shape}."
        )
    return key


class _Size(NamedTuple):
    """The numbers of a config that are traced, so that a sweep over them compiles once."""

    eps: float
    step_size: float


def _split(config: AttackConfig) -> tuple[_Size, AttackConfig]:
    """The traced numbers of a config, and the rest of it, which is static."""
    rest = dataclasses.replace(config, eps=1.0, step_size=1.0)
    return _Size(config.eps, config.step_size), rest


@functools.partial(jax.jit, static_argnames="config")
def _u_pgd(encoder, images, keys, target, start, size, config) -> AttackResult:
    """`u_pgd` without the checks."""
    sign, reference = (1.0, encoder(images)) if target is None else (-1.0, target)
    reference = jax.lax.stop_gradient(reference)

    def objective_fn(attacked):
        representations = encoder(attacked)
        objective = sign * jnp.sum(jnp.square(representations - reference), axis=-1)
        return objective, representations

    def record_fn(representations):
        return all_distances(representations, reference)

    end = _pgd(objective_fn, record_fn, images, keys, size, config, start)
    return AttackResult(
        end.images, end.output, end.objective, AttackHistory(*end.records, *end.norms)
    )


@functools.partial(jax.jit, static_argnames=("loss_fn", "config"))
def _loss_pgd(loss_fn, params, images, keys, size, config) -> LossAttackResult:
    """`loss_pgd` without the checks."""

    def objective_fn(attacked):
        losses = loss_fn(params, attacked)
        return losses, losses

    end = _pgd(objective_fn, lambda losses: losses, images, keys, size, config)
    return LossAttackResult(end.images, end.objective, end.records)


class _End(NamedTuple):
    """Where a run of PGD ended: images, objective (B,), its auxiliary output; history (B,T)."""

    images: Array
    objective: Array
    output: PyTree
    records: PyTree
    norms: tuple[Array, Array, Array]


def _pgd(objective_fn, record_fn, images, keys, size, config, start=None) -> _End:
    """Projected gradient ascent; each image keeps its best restart.

    Args:
      objective_fn: images -> (objective (B,), output), a pytree of (B, ...).
      record_fn: output -> pytree of (B,) for the history.
      images: originals (B,H,W,3).
      keys: a key per image (B,).
      size: eps and step size.
      config: the rest of the attack.
      start: where to start (B,H,W,3) instead of at random.
    """
    gradient_fn = jax.grad(lambda attacked: _summed(objective_fn(attacked)), has_aux=True)

    def step(attacked, _):
        gradient, output = gradient_fn(attacked)
        attacked = attacked + size.step_size * _direction(gradient, config.norm)
        attacked = project(attacked, images, eps=size.eps, norm=config.norm)
        return attacked, (record_fn(output), _norms(attacked - images))

    def run(keys):
        attacked = _start(images, keys, size.eps, config) if start is None else start
        attacked, history = jax.lax.scan(step, attacked, length=config.num_steps)
        records, norms = jax.tree.map(lambda x: x.swapaxes(0, 1), history)
        return _End(attacked, *objective_fn(attacked), records, norms)

    def restart(best, number):
        end = run(jax.vmap(jax.random.fold_in, (0, None))(keys, number))
        better = end.objective > best.objective
        choose = lambda new, old: jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
        return jax.tree.map(choose, end, best), None

    best = run(keys)
    numbers = jnp.arange(1, config.num_restarts)
    return best if config.num_restarts == 1 else jax.lax.scan(restart, best, numbers)[0]


def project(attacked: Array, images: Array, *, eps: float | Array, norm: str) -> Array:
    """Moves `attacked` into the ball of radius `eps` around `images`, and into [0,1].

    linf: clips every pixel to [x - eps, x + eps], then to [0,1]. l2: scales the perturbation to
    eps / max(eps, |delta|_2), clips to [0,1] (which brings it no farther from x, since x is in
    [0,1]) and rounds every pixel towards x, so that rounding can't leave the ball either.

    Args:
      attacked: (B,H,W,3) float32.
      images: (B,H,W,3) float32 in [0,1], the centres.
      eps: radius, > 0, in pixel units.
      norm: "linf" or "l2".
    """
    if norm == "linf":
        return jnp.clip(attacked, jnp.maximum(images - eps, 0.0), jnp.minimum(images + eps, 1.0))
    delta = attacked - images
    length = jnp.sqrt(jnp.sum(jnp.square(delta), axis=(1, 2, 3), keepdims=True))
    delta = delta * (eps / jnp.maximum(length * (1.0 + _NORM_MARGIN), eps))
    moved = jnp.clip(images + delta, 0.0, 1.0)
    return jnp.where(jnp.abs(moved - images) > jnp.abs(delta), jnp.nextafter(moved, images), moved)


def _summed(objective_and_output):
    """Sums the objective: images do not interact, so its gradient is each image's own."""
    objective, output = objective_and_output
    return objective.sum(), output


def _direction(gradient: Array, norm: str) -> Array:
    """Steepest ascent direction of unit length in the norm; 0 where the gradient is 0."""
    if norm == "linf":
        return jnp.sign(gradient)
    # Scaled first: squares of small gradients would underflow.
    largest = jnp.max(jnp.abs(gradient), axis=(1, 2, 3), keepdims=True)
    gradient = gradient / jnp.where(largest > 0, largest, 1.0)
    length = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=(1, 2, 3), keepdims=True))
    return gradient / jnp.maximum(length, 1.0)


def _start(images: Array, keys: Array, eps: float | Array, config: AttackConfig) -> Array:
    """Images uniform in the ball, moved into [0,1]; the images themselves without random start."""
    if not config.random_start:
        return images
    shape = images.shape[1:]
    if config.norm == "linf":
        draw = lambda key: jax.random.uniform(key, shape, minval=-1.0)
    else:
        draw = lambda key: jax.random.ball(key, images[0].size).reshape(shape)
    return project(images + eps * jax.vmap(draw)(keys), images, eps=eps, norm=config.norm)


def _norms(delta: Array) -> tuple[Array, Array, Array]:
    """l1, l2 and linf norms (B,) of perturbations (B,H,W,3)."""
    axes = (1, 2, 3)
    size = jnp.abs(delta)
    return size.sum(axes), jnp.sqrt(jnp.square(delta).sum(axes)), size.max(axes)
