"""FARE with a constraint on clean representations, whose price is learnt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp

from ur_jax.checks import check_number, check_whole
from ur_jax.encoders.base import Encoder
from ur_jax.training.methods.base import Start, register
from ur_jax.training.methods.fare import Fare, FareConfig
from ur_jax.types import Array, Key, PyTree

_LEAST = 1e-12


@register("lore")
@dataclasses.dataclass(frozen=True)
class LoreConfig(FareConfig):
    """Settings of LORE.

    Attributes:
      noise: As of fare.
      rho: Squared distance that a clean representation may move, over its squared length.
      primal_steps: Steps of the encoder for each step of the dual network.
      dual_rate: Learning rate of the dual network.
      dual_width: Hidden units of the dual network.
    """

    rho: float = 0.1
    primal_steps: int = 5
    dual_rate: float = 1.0
    dual_width: int = 64

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "rho", "dual_rate", above=0.0)
        check_whole(self, "primal_steps", "dual_width")

    def make(self, start: Start) -> tuple[Lore, PyTree]:
        encoder = start.encoder()
        return Lore.of(encoder, start.dtype, self), encoder.params


@dataclasses.dataclass(frozen=True)
class Lore(Fare):
    """LORE: attacked images near the original's representations, clean ones within a bound.

      minimise over theta   mean_x  max_(|delta| <= eps) |f_theta(x + delta) - f0(x)|^2
      subject to            |f_theta(x) - f0(x)|^2 <= rho |f0(x)|^2   for every x

    by its Lagrangian, mean_x of  distance(x) + lambda(x) (|f_theta(x) - f0(x)|^2 - rho |f0(x)|^2),
    which theta descends and lambda climbs. The multiplier is a function of the image, a network of
    two layers: lambda(x) = softplus(w2 . h / sqrt(width) + b2), h = relu(W1 u + b1), with u = f0(x)
    over the root mean square of its entries. It begins as 1 (w2 = 0). After every `primal_steps`
    steps of the encoder it makes one step uphill, with the batch that comes next: by the gradient
    of mean_x lambda(x) (|f_theta(x) - f0(x)|^2 / (rho |f0(x)|^2) - 1). All these ratios are there
    so that the rate does not depend on an encoder's scale, on rho or on the width. Plain gradient,
    without momentum or Adam: while the bound is far away the multiplier's logarithm sinks ever more
    slowly, and it rises at once when the bound is passed.

    The constraint is a pressure, not a guarantee: the metrics say how many images of a batch
    violate it ("violations"), how far clean representations have moved over their length, squared
    ("relative_drift"), and the mean multiplier ("multiplier"). Inference mode and all else are as
    in `Fare`. How large the dual network is, its rate and `primal_steps` are choices of ours.

    Attributes:
      encoder: the encoder without its parameters, as `Lore.of` takes it.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and losses are float32 either way.
      settings: of the constraint.

    Reference:
      Khodabandeh et al. 2025, "LORE: Lagrangian-Optimized Robust Embeddings for Visual Encoders",
      arXiv:2505.18884.
    """

    settings: LoreConfig = LoreConfig()

    @classmethod
    def of(
        cls, encoder: Encoder, dtype: str = "float32", settings: LoreConfig = LoreConfig()
    ) -> Self:
        """The method for an encoder; give `encoder.params` to `init_state` as its variables."""
        return cls(dataclasses.replace(encoder, params=None), dtype, settings)

    def init(self, variables: PyTree, key: Key, parts: Mapping[str, PyTree]):
        """The parameters; the original's are the target, beside the dual network."""
        params, stats, target = super().init(variables, key, parts)
        width, dimension = self.settings.dual_width, self.encoder.dimension
        first = jax.random.normal(key, (dimension, width)) * (2.0 / dimension) ** 0.5
        dual = {
            "kernel1": first,
            "bias1": jnp.zeros(width),
            "kernel2": jnp.zeros(width),
            "bias2": jnp.log(jnp.expm1(jnp.ones(()))),  # softplus of it is 1
        }
        return params, stats, {**target, "dual": dual}

    def targets(self, state, views, key, apart):
        """The original's representations (B,D) of the clean first views, after a dual step."""
        target, original = super().targets(state, views, key, apart)
        encode = lambda images: (self.represent(state.variables, state.target, images), {})
        now = apart(encode, views.first)[0]
        is_due = (state.step > 0) & (state.step % self.settings.primal_steps == 0)
        rate = jnp.where(is_due, self.settings.dual_rate, 0.0)
        violation = _relative(now, original) / self.settings.rho - 1.0
        price = lambda dual: jnp.mean(multipliers(dual, original) * violation)
        uphill = jax.grad(price)(target["dual"])
        dual = jax.tree.map(lambda x, slope: x + rate * slope, target["dual"], uphill)
        return {**target, "dual": dual}, original

    def losses(self, variables, target, targets, part):
        """The Lagrangian (b,) of the attacked images; without attack of the clean ones."""
        original = targets[part.rows]
        clean = self.represent(variables, target, part.views.first)
        moved = clean
        if part.attacked is not None:
            moved = self.represent(variables, target, part.attacked)
        distance, drift = _square(moved - original), _square(clean - original)
        multiplier = multipliers(target["dual"], original)
        violation = drift - self.settings.rho * _square(original)
        metrics = {
            # Means over images, which the mean over parts of a batch leaves as they are.
            "relative_loss": jnp.mean(_relative(moved, original)),
            "relative_drift": jnp.mean(_relative(clean, original)),
            "multiplier": jnp.mean(multiplier),
            "violations": jnp.mean((violation > 0.0).astype(jnp.float32)),
        }
        return distance + multiplier * violation, {}, metrics


def _square(x: Array) -> Array:
    """Squared lengths (b,)."""
    return jnp.sum(jnp.square(x), axis=-1)


def _relative(now: Array, original: Array) -> Array:
    """Squared distance to the original over its squared length (b,)."""
    return _square(now - original) / jnp.maximum(_square(original), _LEAST)


def multipliers(params: Mapping[str, Array], original: Array) -> Array:
    """lambda(x) > 0 of each image (b,), by the original's representations (b,D)."""
    square = jnp.mean(jnp.square(original), axis=-1, keepdims=True)
    scaled = original / jnp.sqrt(jnp.maximum(square, _LEAST))
    hidden = jax.nn.relu(scaled @ params["kernel1"] + params["bias1"])
    width = hidden.shape[-1]
    return jax.nn.softplus(hidden @ params["kernel2"] / width**0.5 + params["bias2"])
