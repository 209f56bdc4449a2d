"""A linear probe: softmax regression on frozen features, by SGD with momentum.

Pure functions of features, labels and an order; which images the features belong to is the business
of `jobs.probe`.

Reference: Petrov & Kwiatkowska 2022 (arXiv:2210.04076), section 5; the recipe is that of He et al.
2020 (MoCo), section 4.1; the normalised features that of He et al. 2022 (MAE), appendix A.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ur_jax.checks import check_number, check_whole
from ur_jax.errors import UserError
from ur_jax.typed import check_types
from ur_jax.types import Array, Key

_EPSILON = 1e-6  # of the normalised features
_STATISTICS_RATE = 0.1


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """How a probe is trained; the defaults are the paper's.

    Attributes:
      num_epochs: passes over the images, >= 1.
      learning_rate: at the start, > 0. 30 suits the small features of MoCo's backbones.
      momentum: of SGD, in [0,1).
      milestones: epochs (counted from 0) before which the learning rate falls, increasing.
      decay: factor by which it falls.
      batch_size: images per step, over all devices, >= 1.
      batch_norm: normalise each feature by the batch, in training, and by running statistics
        afterwards (no gain, no bias, eps 1e-6), as MAE's probe does. Use it where features are not
        of MoCo's scale. `finish` folds it into the weights.

    Raises:
      ValueError: for a value out of range.
    """

    num_epochs: int = 25
    learning_rate: float = 30.0
    momentum: float = 0.9
    milestones: tuple[int, ...] = (15, 20)
    decay: float = 0.1
    batch_size: int = 256
    batch_norm: bool = False

    def __post_init__(self):
        check_types(self)
        check_whole(self, "num_epochs", "batch_size")
        check_number(self, "learning_rate", "decay", above=0.0)
        check_number(self, "momentum", least=0.0, below=1.0)
        if (
            list(self.milestones) != sorted(set(self.milestones))
            or min(self.milestones, default=0) < 0
        ):
            raise UserError(f"Expected increasing milestones >= 0, got {self.milestones}.")

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0.

        A plain number, which the history records; `optax.piecewise_constant_schedule` would compute
        it in float32 on a device.
        """
        return self.learning_rate * self.decay ** sum(epoch >= m for m in self.milestones)

    def optimizer(self, learning_rate: Array) -> optax.GradientTransformation:
        """SGD with momentum at a rate that is an argument of the compiled step.

        v <- momentum v + grad,   p <- p - learning_rate v
        """
        return optax.chain(
            optax.trace(decay=self.momentum), optax.scale_by_learning_rate(learning_rate)
        )


class ProbeState(NamedTuple):
    """A probe in training.

    Attributes:
      params: {"kernel": (D,K), "bias": (K,)} float32.
      optimizer: of SGD, its velocity.
      mean, var: running statistics of the features (D,); used with `batch_norm` only.
    """

    params: dict[str, Array]
    optimizer: optax.OptState
    mean: Array
    var: Array


class Totals(NamedTuple):
    """Sums over the images of some steps: losses, correct predictions, images, and those of them
    whose features are NaN or infinite."""

    loss: Array
    correct: Array
    images: Array
    bad: Array


def init_state(key: Key, dimension: int, num_classes: int, *, config: ProbeConfig) -> ProbeState:
    """Returns an untrained probe: weights N(0, 0.01^2), biases 0.

    Args:
      key: draws the weights.
      dimension: D, of the features.
      num_classes: K, at least 2.
      config: of the training.

    Raises:
      ValueError: for fewer than two classes.
    """
    if num_classes < 2:
        raise UserError(f"Expected at least 2 classes, got {num_classes}; give labelled images.")
    kernel = 0.01 * jax.random.normal(key, (dimension, num_classes))
    params = {"kernel": kernel, "bias": jnp.zeros(num_classes)}
    optimizer = config.optimizer(jnp.zeros(())).init(params)
    return ProbeState(params, optimizer, jnp.zeros(dimension), jnp.ones(dimension))


def train_step(
    state: ProbeState,
    features: Array,
    labels: Array,
    mask: Array,
    learning_rate: Array,
    *,
    config: ProbeConfig,
) -> tuple[ProbeState, Totals]:
    """One step of SGD on a batch; pure, to be called inside `jit`.

    The gradient is that of the mean cross-entropy over the images that `mask` keeps.

    Args:
      state: before the step.
      features: (B,D) float32.
      labels: (B,) int32, in [0,K).
      mask: (B,) bool; rows without it count nowhere. All False leaves the state as it is.
      learning_rate: scalar float32.
      config: of it, `momentum` and `batch_norm` matter here.

    Returns:
      The state after the step, and sums over the batch before it.
    """
    weights = mask.astype(jnp.float32)
    count = weights.sum()
    share = weights / jnp.maximum(count, 1.0)
    mean, var = state.mean, state.var
    # Of an image that could not be read, the features may be NaN, and 0 times NaN is NaN.
    features = jnp.where(mask[:, None], features, jnp.float32(0))
    bad = weights @ jnp.any(~jnp.isfinite(features), axis=-1).astype(jnp.float32)
    if config.batch_norm:
        batch_mean = share @ features
        batch_var = share @ jnp.square(features - batch_mean)
        features = (features - batch_mean) * jax.lax.rsqrt(batch_var + _EPSILON)
        # The running variance is the unbiased one, as PyTorch has it.
        unbiased = batch_var * count / jnp.maximum(count - 1.0, 1.0)
        mean = mean + _STATISTICS_RATE * (batch_mean - mean)
        var = var + _STATISTICS_RATE * (unbiased - var)

    def mean_loss(params):
        logits = features @ params["kernel"] + params["bias"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return share @ losses, (weights @ losses, logits)

    grads, (loss, logits) = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, optimizer = config.optimizer(learning_rate).update(grads, state.optimizer)
    params: Any = optax.apply_updates(state.params, updates)
    stepped = ProbeState(params, optimizer, mean, var)
    stepped = jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), stepped, state)
    correct = weights @ (logits.argmax(-1) == labels).astype(jnp.float32)
    return stepped, Totals(loss, correct, count, bad)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def train_epoch(
    state: ProbeState,
    features: Array,
    labels: Array,
    order: Array,
    mask: Array,
    learning_rate: Array,
    *,
    config: ProbeConfig,
) -> tuple[ProbeState, Totals]:
    """An epoch on features that are on the device already, in one call.

    Args:
      state: before the epoch; its buffers are reused.
      features: (N,D) float32.
      labels: (N,) int32.
      order: (B,S) int32, the rows of each step in a column, from `epoch_order`. Divided over
        devices by its leading axis, so is the work.
      mask: (B,S) bool.
      learning_rate: scalar float32.
      config: as in `train_step`.

    Returns:
      The state after the epoch, and sums over it.
    """

    def step(state, batch):
        rows, kept = batch
        return train_step(state, features[rows], labels[rows], kept, learning_rate, config=config)

    state, totals = jax.lax.scan(step, state, (order.T, mask.T))
    return state, jax.tree.map(jnp.sum, totals)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=1)
def encode_and_step(
    encoder: Callable[[Array], Array],
    state: ProbeState,
    images: Array,
    labels: Array,
    mask: Array,
    learning_rate: Array,
    *,
    config: ProbeConfig,
) -> tuple[ProbeState, Totals]:
    """`train_step` on images (B,H,W,3) in [0,1], seen by a frozen encoder (a pytree)."""
    return train_step(state, encoder(images), labels, mask, learning_rate, config=config)


def epoch_order(
    num_images: int, batch_size: int, *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffles an epoch: int32 rows (B,S), and a bool mask (B,S), False where the last is padded.

    Depends on the arguments alone, so that a resumed run goes on in the same order.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_images).astype(np.int32)
    num_steps = math.ceil(num_images / batch_size)
    padding = num_steps * batch_size - num_images
    mask = np.arange(num_steps * batch_size) < num_images
    order = np.concatenate([order, np.repeat(order[-1:], padding)])
    return order.reshape(num_steps, batch_size).T, mask.reshape(num_steps, batch_size).T


def finish(state: ProbeState, *, config: ProbeConfig) -> dict[str, np.ndarray]:
    """Returns the trained probe, {"kernel": (D,K), "bias": (K,)}, with normalisation folded in.

        ((f - m) / s) W + b  =  f (W / s) + (b - (m / s) W),   s = sqrt(var + eps)

    In float64 on the host, rounded to float32 at the end.
    """
    kernel, bias, mean, var = (
        np.asarray(x, np.float64)
        for x in (state.params["kernel"], state.params["bias"], state.mean, state.var)
    )
    if config.batch_norm:
        kernel = kernel / np.sqrt(var + _EPSILON)[:, None]
        bias = bias - mean @ kernel
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def label_ranks(logits: Array, labels: Array) -> Array:
    """How many classes score above the label (B,) int32: below k means correct in the top k.

    Of equal scores the class of lower index is above, as for `argmax`; NaN scores above all.

    Args:
      logits: (B,K).
      labels: (B,) int32, in [0,K).
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])
    is_below = (own > logits) | ((own == logits) & (labels[:, None] < classes))
    return (classes != labels[:, None]).sum(1) - is_below.sum(1)


@jax.jit
def classify(
    classifier: Callable[[Array], Array], images: Array, labels: Array
) -> tuple[Array, Array]:
    """Predicted classes and `label_ranks`, both (B,) int32, of images (B,H,W,3) in [0,1].

    Logits that are NaN or infinite are of no class: -1.

    Args:
      classifier: a pytree that maps images to logits (B,K), e.g. `certify.Classifier`.
      images: (B,H,W,3) float32.
      labels: (B,) int32; where it is negative, the rank is that of class 0 and means nothing.
    """
    logits = classifier(images)
    is_finite = jnp.isfinite(logits).all(-1)
    predicted = jnp.where(is_finite, logits.argmax(-1).astype(jnp.int32), jnp.int32(-1))
    return predicted, label_ranks(logits, jnp.maximum(labels, 0))
