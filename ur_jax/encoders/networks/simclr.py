"""SimCLR v2's ResNets (Chen et al. 2020, arXiv:2006.10029): wider, deeper, selective kernels.

Selective kernels are from Li et al. 2019 (arXiv:1903.06586), in SimCLR v2's form with two 3x3
branches; with them come the stem and the shortcuts of ResNet-D (He et al. 2019, arXiv:1812.01187).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur_jax.encoders.networks.forms import max_pool_3x3, relu
from ur_jax.encoders.networks.layers import (
    Conv,
    ConvNorm,
    NormConfig,
    average_pool,
    global_average,
)
from ur_jax.encoders.networks.resnet import Bottleneck
from ur_jax.types import Array

_SAME3 = ((1, 1), (1, 1))
_SAME7 = ((3, 3), (3, 3))


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU, weighted per channel by the image's content.

    With s the mean over the positions of the branches' sum, the weights are the softmax over the
    two branches of 1x1(ReLU(norm(1x1(s)))).
    """

    features: int
    strides: int
    folded: bool = False
    norm: NormConfig = NormConfig()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        shared: dict[str, Any] = dict(folded=self.folded, norm=self.norm)
        features, squeezed = self.features, max(self.features // 16, 32)
        x = ConvNorm(2 * features, 3, self.strides, _SAME3, **shared, name="branches")(x, train)
        x = relu(x)  # the branches lie side by side in the channels
        context = global_average(x).reshape(-1, 1, 1, 2, features).sum(3)
        context = ConvNorm(squeezed, 1, **shared, name="squeeze")(context, train)
        logits = Conv(2 * features, 1, name="excite")(relu(context))
        logits = logits.reshape(-1, 1, 1, 2, features).astype(jnp.float32)
        x = x * jax.nn.softmax(logits, axis=3).reshape(-1, 1, 1, 2 * features).astype(x.dtype)
        return x[..., :features] + x[..., features:]


class SelectiveKernelBottleneck(nn.Module):
    """A bottleneck whose 3x3 convolution is a selective kernel and whose shortcut averages."""

    features: int
    strides: int
    folded: bool = False
    norm: NormConfig = NormConfig()
    expansion = 4

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        shared: dict[str, Any] = dict(folded=self.folded, norm=self.norm)
        y = relu(ConvNorm(self.features, 1, **shared, name="conv1")(x, train))
        y = SelectiveKernel(self.features, self.strides, **shared, name="select")(y, train)
        out = self.features * self.expansion
        y = ConvNorm(out, 1, **shared, name="expand")(y, train)
        if x.shape != y.shape:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
            x = average_pool(x, 2, self.strides)
            x = ConvNorm(out, 1, **shared, name="pooled_shortcut")(x, train)
        return relu(x + y)


class SimCLRResNet(nn.Module):
    """A SimCLR v2 ResNet up to its pooled features.

    Attributes:
      stage_sizes: number of blocks in each stage.
      width: channels of the first stage, 64 times the width factor.
      selective: with selective kernels ("sk1") or without ("sk0").
      folded: BatchNorm folded into the convolutions (inference) or kept apart (training).
      norm: settings of the BatchNorms.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    selective: bool = False
    folded: bool = False
    norm: NormConfig = NormConfig()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Maps images (B,H,W,3) to pooled features (B, 32 * width)."""
        shared: dict[str, Any] = dict(folded=self.folded, norm=self.norm)
        if self.selective:
            stem = ((self.width // 2, 3, 2), (self.width // 2, 3, 1), (self.width, 3, 1))
        else:
            stem = ((self.width, 7, 2),)
        for index, (features, size, strides) in enumerate(stem, start=1):
            padding = _SAME3 if size == 3 else _SAME7
            layer = ConvNorm(features, size, strides, padding, **shared, name=f"stem{index}")
            x = relu(layer(x, train))
        x = max_pool_3x3(x)
        block = SelectiveKernelBottleneck if self.selective else Bottleneck
        for stage, num_blocks in enumerate(self.stage_sizes, start=1):
            for index in range(num_blocks):
                strides = 2 if stage > 1 and index == 0 else 1
                features = self.width * 2 ** (stage - 1)
                name = f"stage{stage}_block{index}"
                x = block(features, strides, **shared, name=name)(x, train)
        return global_average(x)
