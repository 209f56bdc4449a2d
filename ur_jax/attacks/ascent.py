"""The one loop of every attack: start, gradient, step, projection; and restarts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ur_jax.attacks.ball import Ball, norms
from ur_jax.attacks.config import AttackConfig, Size
from ur_jax.attacks.rules import RULES, Point, StepRule, better
from ur_jax.encoders.networks.rewritten import with_fast_gradients
from ur_jax.types import Array, PyTree

_DRAWS = 0x5EED
"""The stream of what rules and objectives draw, apart from that of the start."""


class Health(NamedTuple):
    """What an attack could not go by, each (B,) int32, over all steps of all restarts.

    Attributes:
      zero_gradients: steps whose gradient was zero in every pixel: the image stayed where it was.
        A share near 1 says that the encoder has no gradient (it rounds, compares, or has died), and
        that its distances are those of the random start.
      bad_gradients: entries of gradients that were NaN, which count as 0, or infinite, which count
        as the largest number.
      nan_ends: restarts that ended where the objective is NaN. An image keeps such an end only if
        all its restarts have one.
    """

    zero_gradients: Array
    bad_gradients: Array
    nan_ends: Array


class End(NamedTuple):
    """Where a run ended: images, objective (B,), its auxiliary output; history (B,T); health.

    `objectives` and `records` are those before each step, `norms` those after it.
    """

    images: Array
    objective: Array
    output: PyTree
    objectives: Array
    records: PyTree
    norms: tuple[Array, Array, Array]
    health: Health


def ascend(
    objective_fn: Callable[[Array, Array], tuple[Array, PyTree]],
    record_fn: Callable[[PyTree], PyTree],
    images: Array,
    keys: Array,
    size: Size,
    config: AttackConfig,
    start: Array | None = None,
    mask: Array | None = None,
) -> End:
    """Projected gradient ascent by the config's rule; each image keeps its best restart.

    What is not finite in a gradient leads nowhere and is counted: attacked images are finite
    wherever the originals and the rule are.

    Args:
      objective_fn: (images, a key of this evaluation for each) -> (objective (B,), output), a
        pytree of (B, ...).
      record_fn: output -> pytree of (B,) for the history.
      images: originals (B,H,W,3).
      keys: a key per image (B,).
      size: eps and step size.
      config: the rest of the attack.
      start: where to start (B,H,W,3) instead of as the config says.
      mask: (B,H,W,1) bool, the pixels that may change.
    """
    ball, rule = Ball(images, size.eps, config.norm, mask), RULES[config.rule]()
    gradient_fn = _gradient_fn(objective_fn, rule)
    fold = jax.vmap(jax.random.fold_in, (0, None))

    def step(keys, carry, number):
        attacked, state, best = carry
        own = fold(keys, number)
        gradient, (objective, output) = gradient_fn(attacked, own)
        gradient, trouble = _usable(gradient, rule)
        best = better((attacked, objective, output), best) if best else best
        point = Point(attacked, gradient, objective, number, own)
        state, proposed = rule.step(state, ball, point)
        moved = ball.project(proposed)
        seen = objective, record_fn(output), norms(moved - images), trouble
        return (moved, state, best), seen

    def run(keys):
        attacked = start_of(ball, keys, config) if start is None else start
        state = rule.init(ball, attacked, size.step_size, config.num_steps)
        draws = fold(keys, _DRAWS)
        best = _unreached(objective_fn, attacked, draws) if rule.keeps_best else ()
        numbers = jnp.arange(config.num_steps)
        (attacked, _, best), history = jax.lax.scan(
            functools.partial(step, draws), (attacked, state, best), numbers
        )
        last = (attacked, *objective_fn(attacked, fold(draws, config.num_steps)))
        attacked, objective, output = better(last, best) if best else last
        in_time = jax.tree.map(lambda x: x.swapaxes(0, 1), history)
        objectives, records, sizes, (zero, bad) = in_time
        nan_ends = jnp.isnan(objective).astype(jnp.int32)
        health = Health(zero.sum(1), bad.sum(1), nan_ends)
        return End(attacked, objective, output, objectives, records, sizes, health)

    def restart(best, number):
        end = run(jax.vmap(jax.random.fold_in, (0, None))(keys, number))
        health = jax.tree.map(jnp.add, end.health, best.health)
        return better(end, best)._replace(health=health), None

    best = run(keys)
    numbers = jnp.arange(1, config.num_restarts)
    return best if config.num_restarts == 1 else jax.lax.scan(restart, best, numbers)[0]


def start_of(ball: Ball, keys: Array, config: AttackConfig) -> Array:
    """Where a config starts: uniform in the ball, as its rule says, or at the originals."""
    if not config.random_start:
        return jnp.asarray(ball.images)
    own = getattr(RULES[config.rule](), "start", None)
    return ball.draw(keys) if own is None else ball.project(own(ball, keys))


def best_until(objectives: Array, values: Array) -> Array:
    """What a history holds of the best point until each step, instead of the present one.

    Args:
      objectives: (B,T), what was maximised, before each step.
      values: (B,T) of the same points.
    """
    known = jnp.where(jnp.isnan(objectives), -jnp.inf, objectives)
    is_new = known > jnp.concatenate(
        [jnp.full_like(known[:, :1], -jnp.inf), jax.lax.cummax(known, axis=1)[:, :-1]], axis=1
    )
    steps = jnp.arange(known.shape[1])
    place = jax.lax.cummax(jnp.where(is_new, steps, 0), axis=1)
    return jnp.take_along_axis(values, place, axis=1)


def _gradient_fn(objective_fn, rule: StepRule):
    """(images, keys) -> (gradient, (objective (B,), output)); 0 for a rule that needs none."""
    if not getattr(rule, "needs_gradient", True):
        return lambda attacked, keys: (jnp.zeros_like(attacked), objective_fn(attacked, keys))

    fast_fn = with_fast_gradients(objective_fn)  # of a user's own convolutions, in this loop

    def summed(attacked, keys):
        objective, output = fast_fn(attacked, keys)
        return objective.sum(), (objective, output)  # images do not interact: each has its own

    return jax.grad(summed, has_aux=True)


def _usable(gradient: Array, rule: StepRule) -> tuple[Array, tuple[Array, Array]]:
    """A finite gradient; of each image whether it is all zero, and how many entries were not."""
    if not getattr(rule, "needs_gradient", True):
        nothing = jnp.zeros(len(gradient), jnp.int32)
        return gradient, (nothing, nothing)
    axes = (1, 2, 3)
    bad = jnp.sum(~jnp.isfinite(gradient), axes, dtype=jnp.int32)
    gradient = jnp.nan_to_num(gradient)
    return gradient, (jnp.all(gradient == 0.0, axes).astype(jnp.int32), bad)


def _unreached(objective_fn, attacked, keys) -> tuple[Array, Array, PyTree]:
    """What every point is better than."""
    objective, output = jax.eval_shape(objective_fn, attacked, keys)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), output)
    return attacked, jnp.full(objective.shape, jnp.nan, objective.dtype), zeros
