"""Expectation over transformations: attacks on what is random, or must survive what is.

    transformed = functools.partial(apply_transformed, transform=shifted)   # once: it is static
    result = eot_pgd(transformed, encoder, images, key, config=config)

Reference: Athalye et al. 2018, "Synthesizing Robust Adversarial Examples" (arXiv:1707.07397).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ur_jax.attacks.ascent import ascend
from ur_jax.attacks.ball import image_keys
from ur_jax.attacks.config import AttackConfig, check_radius, split
from ur_jax.attacks.objectives import OBJECTIVES, Aim
from ur_jax.attacks.rules import RULES
from ur_jax.attacks.unsupervised import AttackHistory, AttackResult
from ur_jax.checks import check_finite_array, check_pixels, check_type, whole_number
from ur_jax.distances import all_distances
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.types import Array, Images, Keys, PyTree, Representations

_REFERENCE, _FINAL, _COMMON = 0xC1EA, 0xF1A1, 0xC033  # streams of draws not a step's own

RandomEncoder = Callable[[PyTree, Array, Array], Array]
"""(params, images (B,H,W,3), a key for each (B,)) -> representations (B,D)."""


def eot_pgd(
    random_fn: RandomEncoder,
    params: PyTree,
    images: Images,
    key: Keys,
    *,
    config: AttackConfig,
    num_samples: int = 8,
    target: Representations | None = None,
) -> AttackResult:
    """Moves the expected representation of a random encoder, or of randomly transformed images.

        maximise the mean over samples s of objective(f(x + delta, key_s))

    The gradient is of samples drawn anew at each step. A rule that keeps the best point, or halves
    its steps, compares points under the same samples: no lucky draw is kept for a good point.

    Args:
      random_fn: pure and jittable, (params, images (B,H,W,3), keys (B,)) -> (B,D) float32; each
        image uses its own key. It is compared by identity: make it once. For transformations, see
        `apply_transformed`.
      params: what it takes beside the images, any pytree, such as an encoder.
      images: originals (B,H,W,3) float32 in [0,1].
      key: as in `u_pgd`.
      config: as in `u_pgd`; any rule, any objective without a bank. `eps` is of the image itself,
        before it is transformed.
      num_samples: draws of each evaluation, >= 1; a step costs as many passes forward and back, and
        as many forward for the comparison.
      target: representations (B,D) to move towards; by default away from the mean of 8 times as
        many draws at the clean image.

    Returns:
      As `u_pgd`: representations are means over 8 times `num_samples` fresh draws at the attacked
      images; the history and the objective are of the samples by which points are compared.

    Raises:
      UserError: for images, a key or a config as in `u_pgd`, or a function whose result is no
        (B,D).

    Reference:
      Athalye et al. 2018, section 2.
    """
    check_type("config", config, AttackConfig)
    check_pixels(images)
    check_radius(config, images)
    num_samples = whole_number(num_samples, "num_samples", least=1)
    if not callable(random_fn):
        raise UserError(
            "Expected random_fn to be a function of (params, images, keys), got "
            f"{type(random_fn).__name__}."
        )
    if getattr(OBJECTIVES[config.objective](), "needs_bank", False):
        raise UserError(f"Expected an objective without a bank, got {config.objective!r}.")
    keys = image_keys(key, len(images))
    if target is not None:
        check_finite_array("target", target, (len(images), target.shape[-1]))
    return _eot_pgd(random_fn, params, images, keys, target, *split(config), num_samples)


@functools.partial(jax.jit, static_argnames=("random_fn", "config", "num_samples"))
def _eot_pgd(random_fn, params, images, keys, target, size, config, num_samples) -> AttackResult:
    """`eot_pgd` without the checks."""
    fold = jax.vmap(jax.random.fold_in, (0, None))

    def samples(attacked, draws, number):
        one = lambda _, sample: (None, random_fn(params, attacked, fold(draws, sample)))
        return jax.lax.scan(one, None, jnp.arange(number))[1]  # (S,B,D)

    mean = lambda attacked, stream: samples(attacked, fold(keys, stream), 8 * num_samples).mean(0)
    _check_result(jax.eval_shape(random_fn, params, images, keys), len(images))
    reference = jax.lax.stop_gradient(mean(images, _REFERENCE) if target is None else target)
    aim, objective_of = Aim(reference, target is not None), OBJECTIVES[config.objective]()

    common = fold(keys, _COMMON)
    has_gradient = getattr(RULES[config.rule](), "needs_gradient", True)

    def mean_objective(attacked, draws):
        each = samples(attacked, draws, num_samples)
        return jnp.mean(jnp.stack([objective_of(one, aim) for one in each]), axis=0), each.mean(0)

    def objective_fn(attacked, draws):
        compared, output = jax.lax.stop_gradient(mean_objective(attacked, common))
        if not has_gradient:
            return compared, output
        own, _ = mean_objective(attacked, draws)
        # The value of the first, the gradient of the second.
        is_known = jnp.isfinite(own)
        gradient = jnp.where(is_known, own - jax.lax.stop_gradient(own), 0.0)
        return compared + gradient, output

    record_fn = lambda output: all_distances(output, reference)
    end = ascend(objective_fn, record_fn, images, keys, size, config)
    history = AttackHistory._make((*end.records, *end.norms, end.objectives))
    final = mean(end.images, _FINAL)
    return AttackResult(end.images, final, end.objective, history, end.health)


def _check_result(result, num_images: int) -> None:
    """Refuses, while tracing, what is no representation of each image."""
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
    if shape is None or len(shape) != 2 or shape[0] != num_images or dtype != jnp.float32:
        raise UserError(
            f"Expected random_fn to give (B,D) float32 for B={num_images}, got {dtype} {shape}."
        )


def apply_transformed(
    encoder: Encoder, images: Array, keys: Array, *, transform: Callable[[Array, Array], Array]
) -> Array:
    """Representations (B,D) of randomly transformed images, for `eot_pgd`.

    Args:
      encoder: the encoder.
      images: (B,H,W,3) float32 in [0,1].
      keys: a key for each (B,).
      transform: (image (H,W,3), key) -> image (H,W,3), jittable, differentiable where the attack
        is to see through it: a shift, a resize and back, noise.
    """
    return encoder(jnp.clip(jax.vmap(transform)(images, keys), 0.0, 1.0))
