"""MoCo v2 and MoCo v3, plain and adversarial.

The adversarial losses are those of Petrov & Kwiatkowska 2022, section 3.2: the attacked first views
are further queries against the same keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur_jax.encoders.base import DTYPES
from ur_jax.encoders.networks.heads import mocov3_predictor
from ur_jax.encoders.networks.layers import NormConfig
from ur_jax.errors import UserError, unknown_name
from ur_jax.training.losses import in_batch_info_nce, info_nce, moco_logits, normalize
from ur_jax.training.optimizers import Schedule
from ur_jax.types import Array, Key, PyTree


@dataclasses.dataclass(frozen=True)
class MocoV2:
    """MoCo v2: InfoNCE between a query and the momentum encoder's keys, negatives from a queue.

    With an attack, clean and attacked queries have equal weight in the mean.

    Attributes:
      network: unfolded network with a "projection" output of `dimension`.
      mean: per-channel mean subtracted from the [0,1] images.
      std: per-channel standard deviation.
      dimension: width of the projection.
      queue_size: number of negatives; a multiple of the batch size.
      temperature: of the logits.
      momentum: share of itself that the key encoder keeps at each step.
      group_size: images that share BatchNorm statistics in `network`; None for the whole batch.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and losses are float32 either way.

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
    group_size: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        _check(self.temperature, self.dtype)
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"Expected momentum in [0,1), got {self.momentum}.")
        if self.queue_size < 1:
            raise UserError(f"Expected queue_size >= 1, got {self.queue_size}.")

    def init(self, variables: PyTree, key: Key, parts: Mapping[str, PyTree]):
        """The query encoder; a key encoder ("momentum", or a copy) and a queue (K,D), or random."""
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        momentum = parts.get("momentum", variables)
        queue = normalize(jax.random.normal(key, (self.queue_size, self.dimension)))
        target = {
            "params": momentum["params"],
            "batch_stats": momentum.get("batch_stats", {}),
            "queue": queue,
            "position": jnp.zeros((), jnp.int32),
        }
        return params, batch_stats, target

    def targets(self, state, views, key, apart):
        """Moves the key encoder, then returns the keys (B,D) of the second views.

        The batch is shuffled on its way through the key encoder, so that the images which share
        BatchNorm statistics differ from the query's: the loss can't be lowered through them.
        """
        target = state.target
        params = _blend(target["params"], state.params, self.momentum)
        variables = {"params": params, "batch_stats": target["batch_stats"]}
        order = jax.random.permutation(key, len(views.second))
        keys, stats = apart(lambda x: self._project(variables, x), views.second[order])
        keys = normalize(keys)[jnp.argsort(order)]
        return target | {"params": params, "batch_stats": stats}, keys

    def represent(self, variables, target, images):
        """The head's whole output, not normalised."""
        return self._project(variables, images)[0]

    def attack_losses(self, variables, target, targets, rows, images):
        """InfoNCE of the attacked queries against their own keys and the queue."""
        queries = normalize(self.represent(variables, target, images))
        return info_nce(self._logits(queries, target, targets, rows), _zeros(queries))

    def attacked_targets(self, target, targets, attacked, apart):
        """The keys are those of the clean second views."""
        return target, targets

    def losses(self, variables, target, targets, part):
        """InfoNCE of the first views' queries; with attack, the mean of clean and attacked."""
        queries, stats = self._project(variables, part.views.first)
        logits = self._logits(normalize(queries), target, targets, part.rows)
        losses = info_nce(logits, _zeros(logits))
        metrics = {"contrast_accuracy": _first_is_largest(logits)}
        if part.attacked is not None:
            # A pass of its own: clean and attacked images do not share BatchNorm statistics.
            queries, stats = self._project(variables | {"batch_stats": stats}, part.attacked)
            logits = self._logits(normalize(queries), target, targets, part.rows)
            attacked = info_nce(logits, _zeros(logits))
            metrics |= {"clean_loss": losses.mean(), "attacked_loss": attacked.mean()}
            metrics["attacked_contrast_accuracy"] = _first_is_largest(logits)
            losses = (losses + attacked) / 2
        return losses, stats, metrics

    def finish(self, target, targets):
        """Overwrites the oldest keys of the queue by the new ones."""
        rows = (target["position"] + jnp.arange(len(targets), dtype=jnp.int32)) % self.queue_size
        return target | {
            "queue": target["queue"].at[rows].set(targets),
            "position": (target["position"] + len(targets)) % self.queue_size,
        }

    def encoder_variables(self, state):
        """{"params", "batch_stats"} of the query encoder."""
        return state.variables

    def _logits(self, queries, target, keys, rows):
        """Logits (b, 1+K) of the queries of some rows."""
        return moco_logits(queries, keys[rows], target["queue"], temperature=self.temperature)

    def _project(self, variables, images):
        """Projections (b,D) float32 of [0,1] images in training mode, and the moved statistics."""
        outputs, stats = _in_training(self, self.network, variables, images)
        return outputs["projection"].astype(jnp.float32), stats


@dataclasses.dataclass(frozen=True)
class MocoV3:
    """MoCo v3: symmetric in-batch InfoNCE of a predictor against a momentum encoder.

      c(q1, k2) + c(q2, k1), and with an attack on the first view also c(q1a, k2) + c(q2, k1a)

    `params` and `batch_stats` of its state hold {"encoder", "predictor"}.

    Attributes:
      network: unfolded network with a "projection" output.
      mean: per-channel mean subtracted from the [0,1] images.
      std: per-channel standard deviation.
      momentum: share of itself that the momentum encoder keeps, by step: `momentum_schedule`.
      dimension: width of the projection.
      hidden: width of the predictor's hidden layer.
      temperature: of the logits.
      group_size: images that share BatchNorm statistics; None for the whole batch, as published.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and losses are float32 either way.

    Reference:
      Chen et al. 2021, arXiv:2104.02057, algorithm 1.
    """

    network: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    momentum: Schedule
    dimension: int = 256
    hidden: int = 4096
    temperature: float = 0.2
    group_size: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        _check(self.temperature, self.dtype)

    @property
    def predictor(self) -> nn.Module:
        """The predictor, on top of the projection."""
        norm = NormConfig(group_size=self.group_size)
        return mocov3_predictor(self.hidden, self.dimension, norm=norm)

    def init(self, variables: PyTree, key: Key, parts: Mapping[str, PyTree]):
        """The encoder, its predictor ("predictor", or random) and momentum encoder (or a copy)."""
        predictor = parts.get("predictor")
        if predictor is None:
            predictor = self.predictor.init(key, jnp.zeros((2, self.dimension)))
        both = {"encoder": variables, "predictor": predictor}
        pick = lambda kind: {name: part.get(kind, {}) for name, part in both.items()}
        momentum = parts.get("momentum", variables)
        target = {k: momentum.get(k, {}) for k in ("params", "batch_stats")}
        return pick("params"), pick("batch_stats"), target

    def targets(self, state, views, key, apart):
        """Moves the momentum encoder, then returns the keys {"first", "second"} of both views."""
        momentum = self.momentum(state.step)
        params = _blend(state.target["params"], state.params["encoder"], momentum)
        first, target = self._keys(state.target | {"params": params}, views.first, apart)
        second, target = self._keys(target, views.second, apart)
        return target, {"first": first, "second": second}

    def represent(self, variables, target, images):
        """The predictor's output, not normalised."""
        return self._predict(variables, images)[0]

    def attack_losses(self, variables, target, targets, rows, images):
        """c(q1a, k2): the terms of the loss that depend on attacked queries."""
        queries = self.represent(variables, target, images)
        return self._contrast(queries, targets["second"], rows)

    def attacked_targets(self, target, targets, attacked, apart):
        """Adds the keys of the attacked first views."""
        keys, target = self._keys(target, attacked, apart)
        return target, targets | {"attacked": keys}

    def losses(self, variables, target, targets, part):
        """The sum, not the mean, of the two or four terms."""
        first, stats = self._predict(variables, part.views.first)
        second, stats = self._predict(variables | {"batch_stats": stats}, part.views.second)
        terms = [(first, "second"), (second, "first")]
        if part.attacked is not None:
            attacked, stats = self._predict(variables | {"batch_stats": stats}, part.attacked)
            terms += [(attacked, "second"), (second, "attacked")]
        losses = [self._contrast(queries, targets[name], part.rows) for queries, name in terms]
        metrics = {"clean_loss": (losses[0] + losses[1]).mean()}
        if part.attacked is not None:
            metrics["attacked_loss"] = (losses[2] + losses[3]).mean()
        return sum(losses), stats, metrics

    def finish(self, target, targets):
        """Nothing is left to do."""
        return target

    def encoder_variables(self, state):
        """{"params", "batch_stats"} of the encoder with its projector, without the predictor."""
        return {"params": state.params["encoder"], "batch_stats": state.batch_stats["encoder"]}

    def _contrast(self, queries, keys, rows):
        """InfoNCE (b,) of the queries of some rows against all keys."""
        return in_batch_info_nce(queries, keys, rows, temperature=self.temperature)

    def _keys(self, target, images, apart):
        """Keys (B,D) of the momentum encoder, and `target` with its moved statistics."""

        def project(images):
            outputs, stats = _in_training(self, self.network, target, images)
            return outputs["projection"].astype(jnp.float32), stats

        keys, stats = apart(project, images)
        return keys, target | {"batch_stats": stats}

    def _predict(self, variables, images):
        """Predictions (b,D) float32 of [0,1] images in training mode, and the moved statistics."""
        of = lambda name: {kind: tree[name] for kind, tree in variables.items()}
        outputs, stats = _in_training(self, self.network, of("encoder"), images)
        outputs, predictor_stats = self.predictor.apply(
            of("predictor"), outputs["projection"], train=True, mutable="batch_stats"
        )
        stats = {"encoder": stats, "predictor": predictor_stats.get("batch_stats", {})}
        return outputs["prediction"].astype(jnp.float32), stats


def _in_training(method, network, variables, images):
    """Outputs of a network on [0,1] images in training mode, and its moved statistics."""
    mean, std = jnp.asarray(method.mean), jnp.asarray(method.std)
    images = ((images - mean) / std).astype(method.dtype)
    variables = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    outputs, updated = network.apply(variables, images, train=True, mutable="batch_stats")
    return outputs, updated.get("batch_stats", {})


def _blend(old: PyTree, new: PyTree, momentum: float | Array) -> PyTree:
    """momentum * old + (1 - momentum) * new."""
    return jax.tree.map(lambda k, q: momentum * k + (1.0 - momentum) * q, old, new)


def _zeros(rows: Array) -> Array:
    """The column of the positive, 0, for each row."""
    return jnp.zeros(len(rows), jnp.int32)


def _first_is_largest(logits: Array) -> Array:
    """Share of rows whose positive has the largest logit."""
    return jnp.mean(logits[:, 0] >= logits.max(1), dtype=jnp.float32)


def _check(temperature: float, dtype: str) -> None:
    """Raises ValueError for settings out of range."""
    if not 0.0 < temperature:
        raise UserError(f"Expected temperature > 0, got {temperature}.")
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
