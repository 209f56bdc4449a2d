"""Label-free adversarial fine-tuning of any encoder, which keeps its representations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from ur_jax.checks import check_number
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.training.methods.base import MethodConfig, Start, check_dtype, register
from ur_jax.training.views import FARE, AugmentConfig
from ur_jax.types import Key, PyTree


@register("fare")
@dataclasses.dataclass(frozen=True)
class FareConfig(MethodConfig):
    """Settings of FARE; its attack and its optimizer are the command's.

    Attributes:
      noise: Standard deviation of Gaussian noise on the views, for encoders that will be smoothed.
    """

    noise: float = 0.0

    needs_init: ClassVar[bool] = True  # it keeps a trained encoder's outputs
    takes_representation: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "noise", least=0.0, most=1.0)

    def views(self, size: tuple[int, int]) -> tuple[AugmentConfig, None]:
        return dataclasses.replace(FARE.at(size), noise=self.noise), None

    def make(self, start: Start) -> tuple[Fare, PyTree]:
        encoder = start.encoder()
        return Fare.of(encoder, start.dtype), encoder.params


@dataclasses.dataclass(frozen=True)
class Fare:
    """FARE: attacked images shall keep the representations that their originals had before.

      minimise over theta   mean_x  max_(|delta| <= eps) |f_theta(x + delta) - f_original(x)|^2

    The inner maximum is the "loss" attack of `train_step`. The network runs in inference mode:
    statistics of BatchNorms, and every collection of a flax module's variables but "params", stay
    as they are. So heads trained on the original's representations remain usable.

    Attributes:
      encoder: the encoder without its parameters, as `Fare.of` takes it.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and losses are float32 either way.

    Reference:
      Schlarmann et al. 2024, "Robust CLIP", arXiv:2402.12336, equation 3.
    """

    encoder: Encoder
    dtype: str = "float32"

    def __post_init__(self):
        check_dtype(self.dtype)
        if jax.tree.leaves(self.encoder.params):
            raise UserError("Expected an encoder without parameters; use Fare.of(encoder).")

    @property
    def group_size(self) -> int:
        """Images that share BatchNorm statistics: each is alone, in inference mode."""
        return 1

    @classmethod
    def of(cls, encoder: Encoder, dtype: str = "float32") -> Self:
        """The method for an encoder; give `encoder.params` to `init_state` as its variables."""
        return cls(dataclasses.replace(encoder, params=None), dtype)

    def init(self, variables: PyTree, key: Key, parts: Mapping[str, PyTree]):
        """The parameters; the original's are the target."""
        return trained(variables), {}, {"original": variables}

    def targets(self, state, views, key, apart):
        """The original's representations (B,D) of the clean first views."""
        original = state.target["original"]
        encode = lambda images: (self._encode(trained(original), original, images), {})
        return state.target, apart(encode, views.first)[0]

    def represent(self, variables, target, images):
        """The representation as it is now."""
        return self._encode(variables["params"], target["original"], images)

    def attack_losses(self, variables, target, targets, rows, images):
        """Squared distances (b,) to the original's representations."""
        moved = self.represent(variables, target, images)
        return jnp.sum(jnp.square(moved - targets[rows]), axis=-1)

    def attacked_targets(self, target, targets, attacked, apart):
        """They depend on clean images only."""
        return target, targets

    def losses(self, variables, target, targets, part):
        """Squared distances (b,) of the attacked images; of the clean ones without attack."""
        images = part.views.first if part.attacked is None else part.attacked
        losses = self.attack_losses(variables, target, targets, part.rows, images)
        length = jnp.sum(jnp.square(targets[part.rows]), axis=-1)
        # A mean of ratios over images, which the mean over parts of a batch leaves as it is.
        return losses, {}, {"relative_loss": jnp.mean(losses / jnp.maximum(length, 1e-12))}

    def finish(self, target, targets):
        """Nothing is left to do."""
        return target

    def encoder_variables(self, state):
        """What `Encoder.params` becomes."""
        return _combine(state.params, state.target["original"])

    def _encode(self, params, original, images):
        """Representations (b,D) float32 in inference mode."""
        params = _combine(params, original)
        encoder = dataclasses.replace(self.encoder, params=params, dtype=self.dtype)
        return encoder(images)


def trained(variables: PyTree) -> PyTree:
    """What of an encoder's parameters is trained: a flax module's "params", or all of them.

    Of these the floating-point ones; integers, such as a table of positions, stay as they are.
    """
    params = variables["params"] if _is_flax(variables) else variables
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, params)


def _combine(params: PyTree, original: PyTree) -> PyTree:
    """The original's variables with other trained parameters."""
    before = original["params"] if _is_flax(original) else original
    newest = lambda new, old: old if new is None else new
    params = jax.tree.map(newest, params, before, is_leaf=lambda x: x is None)
    return {**original, "params": params} if _is_flax(original) else params


def _is_flax(variables: PyTree) -> bool:
    """Whether these are the variables of a flax module, by collection."""
    return isinstance(variables, Mapping) and "params" in variables
