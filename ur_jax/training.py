"""Self-supervised training: one state pytree, one pure step; a method is its loss and its targets.

A method (`MocoV2` here) is a frozen dataclass with four pure functions:

  init_target(variables, key) -> target
      its own state: momentum encoder, queue, ...
  targets(target, params, views, key) -> (target, targets)
      what the loss compares with; no gradient
  loss(params, batch_stats, target, targets, views) -> (losses (B,), batch_stats, metrics)
  finish(target, targets) -> target
      after the loss, e.g. enqueue the keys

`train_step` is the same for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ur_jax.losses import info_nce, moco_logits, normalize
from ur_jax.types import Array, Key, PyTree


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


class Views(NamedTuple):
    """Two augmentations of the same images, each (B,H,W,3) float32 in [0,1]."""

    first: Array
    second: Array


class Method(Protocol):
    """What a training method provides; see the module docstring."""

    def init_target(self, variables: PyTree, key: Key) -> PyTree: ...
    def targets(
        self, target: PyTree, params: PyTree, views: Views, key: Key
    ) -> tuple[PyTree, PyTree]: ...
    def loss(
        self, params: PyTree, batch_stats: PyTree, target: PyTree, targets: PyTree, views: Views
    ) -> tuple[Array, PyTree, dict[str, Array]]: ...
    def finish(self, target: PyTree, targets: PyTree) -> PyTree: ...


@dataclasses.dataclass(frozen=True)
class MocoV2:
    """MoCo v2: InfoNCE between a query and the momentum encoder's keys, negatives from a queue.

    Attributes:
      network: unfolded network with a "projection" output of `dimension`.
      mean: per-channel mean subtracted from the [0,1] images.
      std: per-channel standard deviation.
      dimension: width of the projection.
      queue_size: number of negatives; a multiple of the batch size.
      temperature: of the logits.
      momentum: share of itself that the key encoder keeps at each step.

    Reference:
      He et al. 2020, "Momentum Contrast", algorithm 1; Chen et al. 2020, arXiv:2003.04297.
    """

    network: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dimension: int = 128
    queue_size: int = 65280
    temperature: float = 0.2
    momentum: float = 0.999

    def __post_init__(self):
        if not 0.0 < self.temperature:
            raise ValueError(f"Expected temperature > 0, got {self.temperature}.")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"Expected momentum in [0,1), got {self.momentum}.")
        if self.queue_size < 1:
            raise ValueError(f"Expected queue_size >= 1, got {self.queue_size}.")

    def init_target(self, variables: PyTree, key: Key) -> PyTree:
        """Returns a key encoder equal to the query encoder, and a random queue (K,D)."""
        queue = jax.random.normal(key, (self.queue_size, self.dimension))
        # Copies: the two encoders' buffers are donated to the step separately.
        return {
            "params": jax.tree.map(jnp.copy, variables["params"]),
            "batch_stats": jax.tree.map(jnp.copy, variables.get("batch_stats", {})),
            "queue": normalize(queue),
            "position": jnp.zeros((), jnp.int32),
        }

    def targets(self, target, params, views, key):
        """Moves the key encoder, then returns the keys (B,D) of the second views.

        The batch is shuffled on its way through the key encoder, so that the images which share
        BatchNorm statistics differ from the query's: the loss can't be lowered through them.
        """
        blend = lambda k, q: self.momentum * k + (1.0 - self.momentum) * q
        key_params = jax.tree.map(blend, target["params"], params)
        order = jax.random.permutation(key, len(views.second))
        keys, key_stats = self._project(key_params, target["batch_stats"], views.second[order])
        keys = jax.lax.stop_gradient(keys[jnp.argsort(order)])
        return target | {"params": key_params, "batch_stats": key_stats}, keys

    def loss(self, params, batch_stats, target, targets, views):
        """InfoNCE of the first views' queries against their keys and the queue."""
        queries, batch_stats = self._project(params, batch_stats, views.first)
        logits = moco_logits(queries, targets, target["queue"], temperature=self.temperature)
        losses = info_nce(logits, jnp.zeros(len(logits), jnp.int32))
        accuracy = jnp.mean(logits[:, 0] >= logits.max(1), dtype=jnp.float32)
        return losses, batch_stats, {"contrast_accuracy": accuracy}

    def finish(self, target, targets):
        """Overwrites the oldest keys of the queue by the new ones."""
        rows = (target["position"] + jnp.arange(len(targets), dtype=jnp.int32)) % self.queue_size
        return target | {
            "queue": target["queue"].at[rows].set(targets),
            "position": (target["position"] + len(targets)) % self.queue_size,
        }

    def _project(self, params, batch_stats, images):
        """Unit-norm projections of [0,1] images in training mode, and the moved statistics."""
        images = (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        outputs, updated = self.network.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable="batch_stats",
        )
        return normalize(outputs["projection"]), updated.get("batch_stats", {})


def cosine_schedule(
    base_rate: float,
    *,
    steps_per_epoch: int,
    num_epochs: float,
    warmup_epochs: float = 0.0,
    per_epoch: bool = False,
) -> Callable[[Array], Array]:
    """Learning rate by step: linear warm-up from 0, then half a cosine to 0.

    Args:
      base_rate: the peak.
      steps_per_epoch: steps that make one epoch.
      num_epochs: epochs until 0 is reached.
      warmup_epochs: epochs of warm-up.
      per_epoch: constant within an epoch, as MoCo v2 has it.
    """

    def schedule(step):
        epoch = step / steps_per_epoch
        epoch = jnp.floor(epoch) if per_epoch else epoch
        progress = (epoch - warmup_epochs) / (num_epochs - warmup_epochs)
        cosine = 0.5 * base_rate * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(
            epoch < warmup_epochs, base_rate * epoch / max(warmup_epochs, 1e-9), cosine
        )

    return schedule


def sgd(schedule: optax.Schedule, *, momentum: float = 0.9, weight_decay: float = 1e-4):
    """SGD as PyTorch has it: the decay, on every parameter, is part of the gradient."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=momentum)
    )


def init_state(
    method: Method, variables: PyTree, optimizer: optax.GradientTransformation, key: Key
) -> TrainState:
    """Returns the state before the first step.

    Args:
      method: the training method.
      variables: {"params", "batch_stats"} of its network, unfolded.
      optimizer: an optax optimizer.
      key: for what the method draws, e.g. the queue.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        target=method.init_target(variables, key),
        opt_state=optimizer.init(variables["params"]),
    )


def train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    views: Views,
    key: Key,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of training. Pure; jit it with `method` and `optimizer` static.

    Args:
      method: the training method.
      optimizer: the optimizer whose state `state` holds.
      state: the state before the step.
      views: two augmentations of the batch.
      key: for what the method draws in a step, e.g. the shuffle.

    Returns:
      The state after the step, and scalars: "loss", "grad_norm" and the method's own.
    """
    target, targets = method.targets(state.target, state.params, views, key)

    def mean_loss(params):
        losses, batch_stats, metrics = method.loss(
            params, state.batch_stats, target, targets, views
        )
        return losses.mean(), (batch_stats, metrics)

    (loss, (batch_stats, metrics)), grads = jax.value_and_grad(mean_loss, has_aux=True)(
        state.params
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        target=method.finish(target, targets),
        opt_state=opt_state,
    )
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
