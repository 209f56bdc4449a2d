"""APGD: projected gradient ascent that chooses its own steps.

Reference: Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
Diverse Parameter-free Attacks" (arXiv:2003.01690), algorithm 1; in l1 Croce & Hein 2021, "Mind the
Box" (arXiv:2103.01208), section 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ur_jax.attacks.ball import Ball
from ur_jax.attacks.rules import RULES, Point, better, pick
from ur_jax.types import Array

_FIRST, _SHORTER, _SHORTEST = 0.22, 0.03, 0.06  # of the budget: intervals between checkpoints
_L1_EVERY, _L1_SHARE, _L1_FEWER = 0.04, 0.2, 0.95
_L1_LARGER, _L1_SHORTER, _L1_SHORTEST = 1.5, 1.5, 10.0


class Best(NamedTuple):
    """The best point that an image passed through, with its gradient."""

    images: Array
    objective: Array
    gradient: Array


class State(NamedTuple):
    """Of linf and l2; all (B, ...).

    Attributes:
      previous: the images before the last step.
      best: the best point so far.
      last: objective before the last step.
      size: length of the next step.
      rises: steps since the last checkpoint after which the objective was larger.
      was_halved: whether the step was halved at the last checkpoint.
      best_then: the best objective at the last checkpoint.
    """

    previous: Array
    best: Best
    last: Array
    size: Array
    rises: Array
    was_halved: Array
    best_then: Array


class SparseState(NamedTuple):
    """Of l1; all (B, ...): best point, length of the next step, share of the values that it moves,
    and how many values of the best point had changed at the last checkpoint."""

    best: Best
    size: Array
    share: Array
    changed_then: Array


@RULES.register("apgd")
@dataclasses.dataclass(frozen=True)
class Apgd:
    """Steps that start at 2 eps and halve where they no longer help; the best point seen.

    linf and l2: with z = P(x_k + size direction(gradient)), the next point is
    P(x_k + momentum (z - x_k) + (1 - momentum) (x_k - x_{k-1})), the first one z itself. At the
    checkpoints the step halves, and the image goes back to its best point, if fewer than a share of
    `rho` of the steps since the last checkpoint rose, or if then and now neither step nor best
    changed. l1: no momentum; steps of eps move a share of the values, which at every checkpoint
    becomes that of the values changed in the best point over 1.5; where these have become fewer by
    5 % the step is eps again and the image goes back to its best point, elsewhere it is 1.5 times
    shorter, down to eps / 10.

    Which steps are checkpoints depends on `num_steps`: what a long run has found at step t is not
    what a run of t steps finds. The config's step size is not used.

    Attributes:
      momentum: share of the gradient's step in a step.
      rho: share of the steps that must rise.
    """

    momentum: float = 0.75
    rho: float = 0.75
    keeps_best = True

    def init(self, ball, start, step_size, num_steps):
        batch = len(start)
        nothing = jnp.full(batch, jnp.nan)
        best = Best(start, nothing, jnp.zeros_like(start))
        if ball.norm == "l1":
            every = max(int(_L1_EVERY * num_steps), 1)
            changed = jnp.full(batch, float(start[0].size))
            return every, SparseState(
                best, jnp.full(batch, ball.eps), jnp.full(batch, _L1_SHARE), changed
            )
        is_checkpoint, length = _checkpoints(num_steps)
        return (is_checkpoint, length), State(
            start, best, jnp.full(batch, jnp.inf), jnp.full(batch, 2.0 * ball.eps),
            jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), nothing,
        )  # fmt: skip

    def step(self, state, ball, point):
        timing, state = state
        if ball.norm == "l1":
            state, proposed = self._sparse_step(timing, state, ball, point)
        else:
            state, proposed = self._dense_step(timing, state, ball, point)
        return (timing, state), proposed

    def _dense_step(self, timing, state: State, ball: Ball, point: Point):
        is_checkpoint, length = (each[point.number] for each in timing)
        here = Best(point.images, point.objective, point.gradient)
        best = better(here, state.best)
        rises = state.rises + (point.objective > state.last).astype(jnp.int32)
        too_few = rises.astype(jnp.float32) < self.rho * length
        stuck = ~state.was_halved & ~(best.objective > state.best_then)
        halves = is_checkpoint & (too_few | stuck)
        here = pick(halves, best, here)
        size = jnp.where(halves, 0.5 * state.size, state.size)
        towards = ball.project(here.images + _each(size) * ball.direction(here.gradient))
        momentum = jnp.where(point.number == 0, 1.0, self.momentum)
        proposed = here.images + momentum * (towards - here.images)
        proposed += (1.0 - momentum) * (here.images - state.previous)
        after = State(
            here.images, best, here.objective, size,
            jnp.where(is_checkpoint, 0, rises),
            jnp.where(is_checkpoint, halves, state.was_halved),
            jnp.where(is_checkpoint, best.objective, state.best_then),
        )  # fmt: skip
        return after, proposed

    def _sparse_step(self, every, state: SparseState, ball: Ball, point: Point):
        here = Best(point.images, point.objective, point.gradient)
        best = better(here, state.best)
        is_checkpoint = (point.number > 0) & (point.number % every == 0)
        changed = jnp.sum(best.images != ball.images, axis=(1, 2, 3)).astype(jnp.float32)
        fewer = changed < _L1_FEWER * state.changed_then
        shorter = jnp.maximum(state.size / _L1_SHORTER, ball.eps / _L1_SHORTEST)
        size = jnp.where(fewer, ball.eps, shorter)
        share = changed / point.images[0].size / _L1_LARGER
        fresh = SparseState(best, size, share, changed)
        after = pick(jnp.broadcast_to(is_checkpoint, fewer.shape), fresh, state._replace(best=best))
        here = pick(is_checkpoint & fewer, best, here)
        direction = ball.direction(here.gradient, after.share)
        return after, here.images + _each(after.size) * direction


def _checkpoints(num_steps: int) -> tuple[Array, Array]:
    """Whether each step is a checkpoint (T,), and the steps since the one before it (T,)."""
    shares = [0.0, _FIRST]
    while shares[-1] < 1.0:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - _SHORTER, _SHORTEST))
    steps = sorted({math.ceil(share * num_steps - 1e-9) for share in shares})
    steps = [step for step in steps if step < num_steps]
    length = np.zeros(num_steps, np.float32)
    length[steps[1:]] = np.diff(steps)
    is_checkpoint = np.zeros(num_steps, bool)
    is_checkpoint[steps] = True
    return jnp.asarray(is_checkpoint), jnp.asarray(length)


def _each(values: Array) -> Array:
    """Values (B,) to multiply images with."""
    return values.reshape(-1, 1, 1, 1)
