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


class End(NamedTuple):
    """Where a run ended: images, objective (B,), its auxiliary output; history (B,T)."""

    images: Array
    objective: Array
    output: PyTree
    records: PyTree
    norms: tuple[Array, Array, Array]


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
        best = best and _better((attacked, objective, output), best)
        state, proposed = rule.step(state, ball, Point(attacked, gradient, objective, number))
        moved = ball.project(proposed)
        return (moved, state, best), (record_fn(output), norms(moved - images))

    def run(keys):
        attacked = start_of(ball, keys, config) if start is None else start
        state = rule.init(ball, attacked, size.step_size, config.num_steps)
        best = _unreached(objective_fn, attacked) if rule.keeps_best else ()
        numbers = jnp.arange(config.num_steps)
        (attacked, _, best), history = jax.lax.scan(step, (attacked, state, best), numbers)
        reached = (attacked, *objective_fn(attacked))
        records, sizes = jax.tree.map(lambda x: x.swapaxes(0, 1), history)
        return End(*(best and _better(reached, best) or reached), records, sizes)

    def restart(best, number):
        end = run(jax.vmap(jax.random.fold_in, (0, None))(keys, number))
        return _better(end, best), None

    best = run(keys)
    numbers = jnp.arange(1, config.num_restarts)
    return best if config.num_restarts == 1 else jax.lax.scan(restart, best, numbers)[0]


def start_of(ball: Ball, keys: Array, config: AttackConfig) -> Array:
    """Images uniform in the ball; the originals for a config without random start."""
    return ball.draw(keys) if config.random_start else ball.images


def _summed(objective_and_output):
    """Sums the objective: images do not interact, so its gradient is each image's own."""
    objective, output = objective_and_output
    return objective.sum(), (objective, output)


def _better(new: Any, old: Any) -> Any:
    """Of each image the one of the larger objective, the second of two tuples of (B, ...)."""
    better = new[1] > old[1]
    choose = lambda new, old: jnp.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return jax.tree.map(choose, new, old)


def _unreached(objective_fn, attacked) -> tuple[Array, Array, PyTree]:
    """What every point is better than."""
    objective, output = jax.eval_shape(objective_fn, attacked)
    return (
        attacked,
        jnp.full(objective.shape, -jnp.inf, objective.dtype),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), output),
    )
