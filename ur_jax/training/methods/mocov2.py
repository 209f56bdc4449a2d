"""MoCo v2, plain and adversarial.

The adversarial loss is that of Petrov & Kwiatkowska 2022, section 3.2: the attacked first views are
further queries against the same keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur_jax.checks import check_number, check_whole
from ur_jax.training.losses import info_nce, moco_logits, normalize
from ur_jax.training.methods.base import MethodConfig, Start, register
from ur_jax.training.methods.momentum import blend, check_settings, in_training
from ur_jax.training.views import MOCO_V2, AugmentConfig
from ur_jax.types import Array, Key, PyTree


@register("mocov2")
@dataclasses.dataclass(frozen=True)
class MocoV2Config(MethodConfig):
    """Settings of MoCo v2; the defaults are the recipe of encoder "demo".

    Attributes:
      queue_size: Number of negatives; a multiple of the batch size.
      temperature: Of the logits.
      key_momentum: Share of itself that the key encoder keeps at each step; of mocov3 at the
        beginning of a cosine to 1.
      group_size: Images that share BatchNorm statistics; the whole batch without.
    """

    queue_size: int = 4096
    temperature: float = 0.1
    key_momentum: float = 0.99
    group_size: int | None = 64

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "temperature", above=0.0)
        check_number(self, "key_momentum", least=0.0, below=1.0)
        check_whole(self, "group_size", optional=True)
        check_whole(self, "queue_size")

    def views(self, size: tuple[int, int]) -> tuple[AugmentConfig, AugmentConfig]:
        view = MOCO_V2.at(size, blur_scale=size[0] / 224)
        return view, view

    def make(self, start: Start) -> tuple[MocoV2, PyTree]:
        settings = start.network_settings("mocov2", self.group_size)
        method = MocoV2(
            **settings,
            queue_size=self.queue_size,
            temperature=self.temperature,
            momentum=self.key_momentum,
        )
        return method, start.variables


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
        check_settings(self)
        check_number(self, "momentum", least=0.0, below=1.0)
        check_whole(self, "queue_size")

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
        params = blend(target["params"], state.params, self.momentum)
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
        outputs, stats = in_training(self, self.network, variables, images)
        return outputs["projection"].astype(jnp.float32), stats


def _zeros(rows: Array) -> Array:
    """The column of the positive, 0, for each row."""
    return jnp.zeros(len(rows), jnp.int32)


def _first_is_largest(logits: Array) -> Array:
    """Share of rows whose positive has the largest logit."""
    return jnp.mean(logits[:, 0] >= logits.max(1), dtype=jnp.float32)
