"""One pure step of training: targets, attack, loss, update. A method fills in what is its own.

A method (`MocoV2`, `MocoV3`, `Fare`, `Lore`, ...) is a frozen dataclass with these pure functions;
`variables` are {"params", "batch_stats"} in training, `rows` the positions (b,) of a part of the
batch:

  init(variables, key, parts) -> (params, batch_stats, target)
      what is trained, its running statistics, and the method's own state: momentum encoder, queue
  targets(state, views, key, apart) -> (target, targets)
      what the loss compares with; no gradient
  represent(variables, target, images) -> (b,D)
      the representation that the in-training attack moves
  attack_losses(variables, target, targets, rows, images) -> (b,)
      the loss at attacked first views, for the attack on the loss itself
  attacked_targets(target, targets, attacked, apart) -> (target, targets)
      targets that depend on the attacked images; no gradient
  losses(variables, target, targets, part) -> (losses (b,), batch_stats, metrics)
      whose mean over the batch is minimised
  finish(target, targets) -> target
      after the loss, e.g. enqueue the keys

The attack is pure: it moves neither the method's state nor running statistics (the published code's
moves both, departure 4), and every image it sees is normalised (departure 9).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ur_jax.attacks import AttackConfig, image_keys, loss_pgd
from ur_jax.errors import UserError, unknown_name
from ur_jax.typed import check_types
from ur_jax.types import Array, Key, PyTree

ATTACKS = ("untargeted", "targeted", "loss")
_NUM_SAMPLES = 8


@struct.dataclass
class TrainState:
    """All that training carries from one step to the next.

    Attributes:
      step: int32 scalar, number of steps done.
      params: float32 parameters being trained.
      batch_stats: running statistics of their BatchNorms.
      target: the method's own state.
      opt_state: the optimizer's.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    target: PyTree
    opt_state: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        """{"params", "batch_stats"}, as a flax network takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Views(NamedTuple):
    """Two augmentations of the same images, each (B,H,W,3) float32 in [0,1]."""

    first: Array
    second: Array


class Part(NamedTuple):
    """Some images of a batch.

    Attributes:
      rows: (b,) int32, their positions in it.
      views: their two views.
      attacked: (b,H,W,3), their attacked first views; None without attack.
    """

    rows: Array
    views: Views
    attacked: Array | None


class Samples(NamedTuple):
    """A few first views (n,H,W,3) of a step, and the same attacked; None without attack."""

    clean: Array
    attacked: Array | None


class StepResult(NamedTuple):
    """State after a step, its scalars ("loss", "grad_norm" and the method's own), and samples.

    The scalar "skipped" is 1 for a step whose update or another scalar is not finite: of such a
    step nothing stays but its number. Otherwise it is 0.
    """

    state: TrainState
    metrics: dict[str, Array]
    samples: Samples


@dataclasses.dataclass(frozen=True)
class Adversary:
    """The attack inside training, on the first view; the defaults are the paper's.

    Attributes:
      kind: "untargeted" moves the representation away from the clean view's; "targeted" towards
        that of the previous image's second view (cyclic in the batch); "loss" raises the
        method's own loss.
      config: the attack.

    Reference:
      Petrov & Kwiatkowska 2022, section 3.2.
    """

    kind: str
    config: AttackConfig = AttackConfig(eps=0.05, step_size=0.005, num_steps=3)

    def __post_init__(self):
        check_types(self)
        if self.kind not in ATTACKS:
            raise unknown_name("attack", self.kind, ATTACKS)
        if self.kind == "untargeted" and not self.config.random_start:
            raise UserError(
                "Expected random_start=True for an untargeted attack, got False: at the original "
                "image the gradient of the distance to itself is exactly zero."
            )
        if self.config.objective != "l2":
            raise UserError(
                f"Expected objective 'l2' inside training, got {self.config.objective!r}: the "
                "attack there raises the method's loss, or moves representations by their squared "
                "distance."
            )


Apart = Callable[..., tuple[PyTree, PyTree]]
"""apart(fn, *trees): fn on the whole batch, or on one part of it after the other.

`fn` returns (outputs, statistics): outputs (b,...) are put together again, statistics averaged.
"""


class Method(Protocol):
    """What a training method provides; see the module docstring.

    `group_size` is the number of images that share BatchNorm statistics, None for the whole batch.
    """

    @property
    def group_size(self) -> int | None: ...

    def init(
        self, variables: PyTree, key: Key, parts: Mapping[str, PyTree]
    ) -> tuple[PyTree, PyTree, PyTree]: ...
    def targets(
        self, state: TrainState, views: Views, key: Key, apart: Apart
    ) -> tuple[PyTree, PyTree]: ...
    def represent(self, variables: PyTree, target: PyTree, images: Array) -> Array: ...
    def attack_losses(
        self, variables: PyTree, target: PyTree, targets: PyTree, rows: Array, images: Array
    ) -> Array: ...
    def attacked_targets(
        self, target: PyTree, targets: PyTree, attacked: Array, apart: Apart
    ) -> tuple[PyTree, PyTree]: ...
    def losses(
        self, variables: PyTree, target: PyTree, targets: PyTree, part: Part
    ) -> tuple[Array, PyTree, dict[str, Array]]: ...
    def finish(self, target: PyTree, targets: PyTree) -> PyTree: ...
    def encoder_variables(self, state: TrainState) -> PyTree: ...


def init_state(
    method: Method,
    variables: PyTree,
    optimizer: optax.GradientTransformation,
    key: Key,
    parts: Mapping[str, PyTree] | None = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      method: the training method.
      variables: {"params", "batch_stats"} of its network, unfolded.
      optimizer: an optax optimizer.
      key: for what the method draws: a queue, a predictor.
      parts: what a published file holds beside the encoder ("momentum", "predictor"); what is
        missing is copied from the encoder or drawn.
    """
    params, batch_stats, target = method.init(variables, key, parts or {})
    # Copies: the buffers are donated to the step one by one.
    params, batch_stats, target = jax.tree.map(jnp.copy, (params, batch_stats, target))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        target=target,
        opt_state=optimizer.init(params),
    )


def train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    adversary: Adversary | None,
    state: TrainState,
    views: Views,
    key: Key,
    *,
    num_parts: int = 1,
) -> StepResult:
    """One step of training. Pure; jit it with all but state, views and key static.

    With `num_parts` > 1 gradients are accumulated over parts of the batch, which takes less memory
    and gives the same step: keys are computed for the whole batch, and a part is made of whole
    groups of images that share BatchNorm statistics.

    Args:
      method: the training method.
      optimizer: the optimizer whose state `state` holds.
      adversary: the attack on the first views; None for plain training.
      state: the state before the step.
      views: two augmentations of the batch.
      key: for what is drawn in a step: the shuffle, the attack's start.
      num_parts: parts of the batch, one after the other.

    Raises:
      ValueError: for a batch that does not divide into `num_parts` parts of whole groups.
    """
    batch_size, group_size = len(views.first), method.group_size
    check_parts(batch_size, group_size, num_parts)
    split = functools.partial(_split, num_parts=num_parts, group_size=group_size or 1)
    apart = functools.partial(_apart, split, num_parts)
    shuffle_key, attack_key = jax.random.split(key)
    target, targets = method.targets(state, views, shuffle_key, apart)
    rows = jnp.arange(batch_size, dtype=jnp.int32)
    attacked = None
    if adversary is not None:
        attack = functools.partial(_attack, method, adversary, state.variables, target, targets)
        goals = _goals(method, adversary, state.variables, target, views, apart)
        keys = image_keys(attack_key, batch_size)
        attacked, _ = apart(attack, rows, views.first, keys, goals)
        target, targets = method.attacked_targets(target, targets, attacked, apart)

    def mean_loss(params, part):
        variables = {"params": params, "batch_stats": state.batch_stats}
        losses, batch_stats, metrics = method.losses(variables, target, targets, part)
        return losses.mean(), (batch_stats, metrics)

    def gradients(part):
        (loss, aux), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params, part)
        return loss, *aux, grads

    # Statistics move linearly with those of a group, so that means over parts are exact too.
    whole = Part(rows, views, attacked)
    loss, batch_stats, metrics, grads = _mean_over_parts(gradients, split(whole), num_parts)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    after = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        target=method.finish(target, targets),
        opt_state=opt_state,
    )
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
    after, is_skipped = _unless_bad(after, state, updates, metrics)
    metrics["skipped"] = is_skipped.astype(jnp.float32)
    samples = jax.tree.map(lambda x: x[:_NUM_SAMPLES], Samples(views.first, attacked))
    return StepResult(after, metrics, samples)


def _unless_bad(after: TrainState, before: TrainState, updates, metrics):
    """The state after a step, or the one before it if the step is not finite; and whether so."""
    sizes = jnp.stack([*metrics.values(), optax.tree.norm(updates)])
    is_bad = ~jnp.all(jnp.isfinite(sizes))
    kept = jax.tree.map(lambda new, old: jnp.where(is_bad, old, new), after, before)
    return kept.replace(step=after.step), is_bad


def check_parts(batch_size: int, group_size: int | None, num_parts: int) -> None:
    """Raises ValueError unless a batch divides into parts of whole groups."""
    if group_size is not None and batch_size % group_size:
        raise UserError(
            f"Expected a batch size divisible by the {group_size} images that share BatchNorm "
            f"statistics, got {batch_size}; change one of the two."
        )
    if num_parts < 1 or batch_size % num_parts or (batch_size // num_parts) % (group_size or 1):
        raise UserError(
            f"Expected num_parts to divide the batch of {batch_size} images into whole groups of "
            f"{group_size or 1}, got {num_parts}."
        )
    if num_parts > 1 and group_size is None:
        raise UserError(
            f"Expected a group_size with num_parts={num_parts}: BatchNorm over the whole batch "
            "needs all of it at once. Set group_size, or num_parts=1."
        )


def _goals(method, adversary, variables, target, views, apart) -> Array | None:
    """What representations are moved away from or towards, (B,D); None for the loss attack."""
    if adversary.kind == "loss":
        return None
    images = views.first if adversary.kind == "untargeted" else views.second
    goals, _ = apart(lambda images: (method.represent(variables, target, images), {}), images)
    return goals if adversary.kind == "untargeted" else jnp.roll(goals, 1, axis=0)


def _attack(method, adversary, variables, target, targets, rows, images, keys, goals):
    """Attacked images (b,H,W,3) of some first views, and no statistics."""

    def loss_fn(taken, attacked):
        variables, target, targets, rows, goals = taken
        if adversary.kind == "loss":
            return method.attack_losses(variables, target, targets, rows, attacked)
        sign = 1.0 if adversary.kind == "untargeted" else -1.0
        moved = method.represent(variables, target, attacked)
        return sign * jnp.sum(jnp.square(moved - goals), axis=-1)

    taken = (variables, target, targets, rows, goals)
    return loss_pgd(loss_fn, taken, images, keys, config=adversary.config).images, {}


def _split(tree: PyTree, *, num_parts: int, group_size: int) -> PyTree:
    """(B,...) -> (num_parts, B/num_parts, ...), whole groups dealt out in turn.

    In turn, so that each part lies on all the devices that the batch is divided over.
    """

    def split(leaf):
        groups = leaf.reshape(-1, num_parts, group_size, *leaf.shape[1:])
        return groups.swapaxes(0, 1).reshape(num_parts, -1, *leaf.shape[1:])

    return jax.tree.map(split, tree)


def _apart(split, num_parts: int, fn: Callable[..., tuple[PyTree, PyTree]], *trees: PyTree):
    """Maps `fn` over the parts of a batch; see `Apart`."""
    if num_parts == 1:
        return fn(*trees)
    outputs, statistics = jax.lax.map(lambda part: fn(*part), split(trees))
    size = jax.tree.leaves(trees)[0].shape[0]
    order = jnp.argsort(split(jnp.arange(size)).reshape(-1))
    join = lambda leaf: leaf.reshape(size, *leaf.shape[2:])[order]
    return jax.tree.map(join, outputs), jax.tree.map(lambda leaf: leaf.mean(0), statistics)


def _mean_over_parts(fn: Callable[[Any], PyTree], parts: PyTree, num_parts: int) -> PyTree:
    """Mean of the outputs of `fn` over the leading axis of `parts`, one in memory at a time."""
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if num_parts == 1:
        return fn(first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn, first))
    add = lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None)
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda leaf: leaf / num_parts, total)
