"""The one loop of every attack: start, gradient, step, projection; and restarts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ur_jax.attacks.ball import Ball, norms
from ur_jax.attacks.config import AttackConfig, Size
from ur_jax.attacks.rules import RULES, Point
from ur_jax.types import Array, PyTree


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
    """Where a run ended: images, objective (B,), its auxiliary output; history (B,T); health."""

    images: Array
    objective: Array
    output: PyTree
    records: PyTree
    norms: tuple[Array, Array, Array]
    health: Health


def ascend(
    objective_fn: Callable[[Array], tuple[Array, PyTree]],
    record_fn: Callable[[PyTree], PyTree],
    images: Array,
    keys: Array,
    size: Size,
    config: AttackConfig,
    start: Array | None = None,
) -> End:
    """Projected gradient ascent by the config's rule; each image keeps its best restart.

    What is not finite in a gradient leads nowhere and is counted: attacked images are finite
    wherever the originals and the rule are.

    Args:
      objective_fn: images -> (objective (B,), output), a pytree of (B, ...).
      record_fn: output -> pytree of (B,) for the history.
      images: originals (B,H,W,3).
      keys: a key per image (B,).
      size: eps and step size.
      config: the rest of the attack.
      start: where to start (B,H,W,3) instead of as the config says.
    """
    ball, rule = Ball(images, size.eps, config.norm), RULES[config.rule]()
    gradient_fn = jax.grad(lambda attacked: _summed(objective_fn(attacked)), has_aux=True)

    def step(carry, number):
        attacked, state, best = carry
        gradient, (objective, output) = gradient_fn(attacked)
        gradient, trouble = _usable(gradient)
        best = _better((attacked, objective, output), best) if best else best
        state, proposed = rule.step(state, ball, Point(attacked, gradient, objective, number))
        moved = ball.project(proposed)
        return (moved, state, best), (record_fn(output), norms(moved - images), trouble)

    def run(keys):
        attacked = start_of(ball, keys, config) if start is None else start
        state = rule.init(ball, attacked, size.step_size, config.num_steps)
        best = _unreached(objective_fn, attacked) if rule.keeps_best else ()
        numbers = jnp.arange(config.num_steps)
        (attacked, _, best), history = jax.lax.scan(step, (attacked, state, best), numbers)
        last = (attacked, *objective_fn(attacked))
        attacked, objective, output = _better(last, best) if best else last
        records, sizes, (zero, bad) = jax.tree.map(lambda x: x.swapaxes(0, 1), history)
        nan_ends = jnp.isnan(objective).astype(jnp.int32)
        health = Health(zero.sum(1), bad.sum(1), nan_ends)
        return End(attacked, objective, output, records, sizes, health)

    def restart(best, number):
        end = run(jax.vmap(jax.random.fold_in, (0, None))(keys, number))
        health = jax.tree.map(jnp.add, end.health, best.health)
        return _better(end, best)._replace(health=health), None

    best = run(keys)
    numbers = jnp.arange(1, config.num_restarts)
    return best if config.num_restarts == 1 else jax.lax.scan(restart, best, numbers)[0]


def start_of(ball: Ball, keys: Array, config: AttackConfig) -> Array:
    """Images uniform in the ball; the originals for a config without random start."""
    return ball.draw(keys) if config.random_start else jnp.asarray(ball.images)


def _summed(objective_and_output):
    """Sums the objective: images do not interact, so its gradient is each image's own."""
    objective, output = objective_and_output
    return objective.sum(), (objective, output)


def _usable(gradient: Array) -> tuple[Array, tuple[Array, Array]]:
    """A finite gradient; of each image whether it is all zero, and how many entries were not."""
    axes = (1, 2, 3)
    bad = jnp.sum(~jnp.isfinite(gradient), axes, dtype=jnp.int32)
    gradient = jnp.nan_to_num(gradient)
    return gradient, (jnp.all(gradient == 0.0, axes).astype(jnp.int32), bad)


def _better(new: Any, old: Any) -> Any:
    """Of each image the one of the larger objective, the second of two tuples of (B, ...).

    NaN is less than any number.
    """
    better = (new[1] > old[1]) | jnp.isnan(old[1])
    choose = lambda new, old: jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return jax.tree.map(choose, new, old)


def _unreached(objective_fn, attacked) -> tuple[Array, Array, PyTree]:
    """What every point is better than."""
    objective, output = jax.eval_shape(objective_fn, attacked)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), output)
    return attacked, jnp.full(objective.shape, jnp.nan, objective.dtype), zeros
