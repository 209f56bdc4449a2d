"""Heads: what a method puts on top of the backbone's features; each cites its paper."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax

from ur_jax.encoders.networks.layers import Dense, DenseNorm, NormConfig, global_average
from ur_jax.encoders.networks.network import Network
from ur_jax.types import Array


class MocoV2Head(nn.Module):
    """MoCo v2's two-layer MLP (Chen et al. 2020, arXiv:2003.04297).

    "projection" is the whole head. "skip_hidden" applies its last layer straight to the features:
    what the paper's code evaluates (departure 5).
    """

    hidden: int = 2048
    output: int = 128

    @nn.compact
    def __call__(self, features: Array, train: bool = False) -> dict[str, Array]:
        last = Dense(self.output, name="fc2")
        hidden = jax.nn.relu(Dense(self.hidden, name="fc0")(features))
        representations = {"projection": last(hidden)}
        if features.shape[-1] == self.hidden:
            representations["skip_hidden"] = last(features)
        return representations


class LinearHead(nn.Module):
    """One linear layer, e.g. a supervised network's classifier; "projection" is its logits."""

    output: int = 1000

    @nn.compact
    def __call__(self, features: Array, train: bool = False) -> dict[str, Array]:
        return {"projection": Dense(self.output, name="fc")(features)}


class MLP(nn.Module):
    """Linear layers, each but the last followed by BatchNorm and ReLU.

    Attributes:
      widths: outputs of the layers.
      last_norm: BatchNorm after the last layer: "affine", "plain" (no scale and bias) or "none".
      hidden_bias: whether the other layers have a bias beside their BatchNorm's.
      last_bias: whether the last layer has one.
      output: name of the result.
      folded: BatchNorm folded into the layers (inference) or kept apart (training).
      norm: settings of the BatchNorms.
    """

    widths: tuple[int, ...]
    last_norm: Literal["affine", "plain", "none"]
    hidden_bias: bool = False
    last_bias: bool = False
    output: str = "projection"
    folded: bool = False
    norm: NormConfig = NormConfig()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> dict[str, Array]:
        """Maps (...,F) to {"hidden": the last layer's input, `output`: (...,widths[-1])}."""
        *hidden, width = self.widths
        for index, features in enumerate(hidden, start=1):
            layer = DenseNorm(
                features, self.hidden_bias, self.folded, self.norm, name=f"layer{index}"
            )
            x = jax.nn.relu(layer(x, train))
        name = f"layer{len(self.widths)}"
        if self.last_norm == "none":
            y = Dense(width, self.last_bias, name=name)(x)
        else:
            affine = {"affine": True, "plain": False}[self.last_norm]
            norm = dataclasses.replace(self.norm, affine=affine)
            y = DenseNorm(width, self.last_bias, self.folded, norm, name=name)(x, train)
        return {"hidden": x, self.output: y}


def mocov3_projector(hidden: int = 4096, output: int = 256, **kwargs) -> MLP:
    """MoCo v3's projector (Chen et al. 2021, arXiv:2104.02057)."""
    return MLP((hidden, hidden, output), "plain", **kwargs)


def mocov3_predictor(hidden: int = 4096, output: int = 256, **kwargs) -> MLP:
    """MoCo v3's predictor, on top of its projector."""
    return MLP((hidden, output), "plain", output="prediction", **kwargs)


def simsiam_projector(width: int = 2048, **kwargs) -> MLP:
    """SimSiam's projector (Chen & He 2021, arXiv:2011.10566, section 3)."""
    return MLP((width,) * 3, "plain", last_bias=True, **kwargs)


def simsiam_predictor(hidden: int = 512, output: int = 2048, **kwargs) -> MLP:
    """SimSiam's bottleneck predictor, on top of its projector."""
    return MLP((hidden, output), "none", last_bias=True, output="prediction", **kwargs)


def simclrv2_projector(width: int = 2048, output: int = 128, **kwargs) -> MLP:
    """SimCLR v2's three-layer projector, as wide as the features (arXiv:2006.10029, section 2)."""
    return MLP((width, width, output), "affine", **kwargs)


def pixpro_projector(hidden: int = 4096, output: int = 256, **kwargs) -> MLP:
    """PixPro's projector of every position (Xie et al. 2021, arXiv:2011.10043)."""
    return MLP((hidden, output), "none", hidden_bias=True, last_bias=True, **kwargs)


class NoHead(nn.Module):
    """What a network published without a head has: its "projection" is the features themselves."""

    def __call__(self, features: Array, train: bool = False) -> dict[str, Array]:
        return {"projection": features}


class PositionwiseNetwork(Network):
    """A network whose head acts on each position of the feature map, as PixPro's does.

    The method compares positions, not images; to have one representation (B,D) of an image, each
    output of the head is averaged over the positions, as the features are.
    """

    def __call__(self, x: Array, train: bool = False) -> dict[str, Array]:
        assert self.head is not None
        feature_map = self.backbone.feature_map(x, train)
        outputs = {"backbone": feature_map, **self.head(feature_map, train)}
        return {name: global_average(output) for name, output in outputs.items()}
