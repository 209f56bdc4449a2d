"""MoCo v3, plain and adversarial.

The adversarial loss is that of Petrov & Kwiatkowska 2022, section 3.2: the attacked first views are
further queries against the same keys, and further keys of the second views' queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from ur_jax.checks import check_number, check_whole
from ur_jax.encoders.networks.heads import mocov3_predictor
from ur_jax.encoders.networks.layers import NormConfig
from ur_jax.training.losses import in_batch_info_nce
from ur_jax.training.methods.base import MethodConfig, Start, register
from ur_jax.training.methods.momentum import blend, check_settings, in_training
from ur_jax.training.optimizers import Schedule, momentum_schedule
from ur_jax.training.views import MOCO_V3_VIEW1, MOCO_V3_VIEW2, AugmentConfig
from ur_jax.types import Key, PyTree


@register("mocov3")
@dataclasses.dataclass(frozen=True)
class MocoV3Config(MethodConfig):
    """Settings of MoCo v3.

    Attributes:
      temperature: Of the logits.
      key_momentum: Share of itself that the momentum encoder keeps at epoch 0 of a cosine to 1.
      group_size: Images that share BatchNorm statistics; the whole batch without.
    """

    temperature: float = 0.1
    key_momentum: float = 0.99
    group_size: int | None = 64

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "temperature", above=0.0)
        check_number(self, "key_momentum", least=0.0, below=1.0)
        check_whole(self, "group_size", optional=True)

    def views(self, size: tuple[int, int]) -> tuple[AugmentConfig, AugmentConfig]:
        scale = size[0] / 224
        return MOCO_V3_VIEW1.at(size, blur_scale=scale), MOCO_V3_VIEW2.at(size, blur_scale=scale)

    def make(self, start: Start) -> tuple[MocoV3, PyTree]:
        settings = start.network_settings("mocov3", self.group_size)
        momentum = momentum_schedule(self.key_momentum, **start.epochs._asdict())
        return MocoV3(**settings, momentum=momentum, temperature=self.temperature), start.variables


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
        check_settings(self)

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
        params = blend(state.target["params"], state.params["encoder"], momentum)
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
        return sum(losses[1:], losses[0]), stats, metrics

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
            outputs, stats = in_training(self, self.network, target, images)
            return outputs["projection"].astype(jnp.float32), stats

        keys, stats = apart(project, images)
        return keys, target | {"batch_stats": stats}

    def _predict(self, variables, images):
        """Predictions (b,D) float32 of [0,1] images in training mode, and the moved statistics."""
        of = lambda name: {kind: tree[name] for kind, tree in variables.items()}
        outputs, stats = in_training(self, self.network, of("encoder"), images)
        outputs, predictor_stats = self.predictor.apply(
            of("predictor"), outputs["projection"], train=True, mutable="batch_stats"
        )
        stats = {"encoder": stats, "predictor": predictor_stats.get("batch_stats", {})}
        return outputs["prediction"].astype(jnp.float32), stats
