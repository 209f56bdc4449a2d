"""ResNets (He et al. 2016): ImageNet-stem 18 and 50, CIFAR-stem 18 and 20."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from ur_jax.encoders.networks.forms import max_pool_3x3, relu
from ur_jax.encoders.networks.layers import ConvNorm, NormConfig, global_average
from ur_jax.types import Array

_SAME3 = ((1, 1), (1, 1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    strides: int
    folded: bool = False
    norm: NormConfig = NormConfig()
    expansion = 1

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        shared: dict[str, Any] = dict(folded=self.folded, norm=self.norm)
        y = ConvNorm(self.features, 3, self.strides, _SAME3, **shared, name="conv1")(x, train)
        y = ConvNorm(self.features, 3, 1, _SAME3, **shared, name="conv2")(relu(y), train)
        if x.shape != y.shape:
            x = ConvNorm(self.features, 1, self.strides, **shared, name="shortcut")(x, train)
        return relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as torchvision has it) and 1x1 convolution, and a shortcut."""

    features: int
    strides: int
    folded: bool = False
    norm: NormConfig = NormConfig()
    expansion = 4

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        shared: dict[str, Any] = dict(folded=self.folded, norm=self.norm)
        y = ConvNorm(self.features, 1, **shared, name="conv1")(x, train)
        y = ConvNorm(self.features, 3, self.strides, _SAME3, **shared, name="conv2")(relu(y), train)
        out = self.features * self.expansion
        y = ConvNorm(out, 1, **shared, name="conv3")(relu(y), train)
        if x.shape != y.shape:
            x = ConvNorm(out, 1, self.strides, **shared, name="shortcut")(x, train)
        return relu(x + y)


class ResNet(nn.Module):
    """A ResNet up to its pooled features.

    Attributes:
      stage_sizes: number of blocks in each stage.
      block: `BasicBlock` or `Bottleneck`.
      width: channels of the first stage; each later one has twice as many.
      stem: "imagenet" (7x7 of stride 2, then max-pooling) or "cifar" (3x3).
      folded: BatchNorm folded into the convolutions (inference) or kept apart (training).
      norm: settings of the BatchNorms.
    """

    stage_sizes: tuple[int, ...]
    block: type[nn.Module] = Bottleneck
    width: int = 64
    stem: str = "imagenet"
    folded: bool = False
    norm: NormConfig = NormConfig()

    def __call__(self, x: Array, train: bool = False) -> Array:
        """Maps images (B,H,W,3) to pooled features (B, width * 2^(stages-1) * expansion)."""
        return global_average(self.feature_map(x, train))

    @nn.compact
    def feature_map(self, x: Array, train: bool = False) -> Array:
        """Maps images (B,H,W,3) to the last feature map (B,h,w,C)."""
        shared: dict[str, Any] = dict(folded=self.folded, norm=self.norm)
        if self.stem == "imagenet":
            x = ConvNorm(self.width, 7, 2, ((3, 3), (3, 3)), **shared, name="stem")(x, train)
            x = max_pool_3x3(relu(x))
        else:
            x = relu(ConvNorm(self.width, 3, 1, _SAME3, **shared, name="stem")(x, train))
        for stage, num_blocks in enumerate(self.stage_sizes):
            for index in range(num_blocks):
                strides = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage + 1}_block{index + 1}"
                x = self.block(self.width * 2**stage, strides, **shared, name=name)(x, train)
        return x


def resnet18(**kwargs) -> ResNet:
    """ImageNet-stem ResNet-18, 512 pooled features."""
    return ResNet((2, 2, 2, 2), BasicBlock, **kwargs)


def resnet50(**kwargs) -> ResNet:
    """ImageNet-stem ResNet-50, 2048 pooled features."""
    return ResNet((3, 4, 6, 3), Bottleneck, **kwargs)


def cifar_resnet18(**kwargs) -> ResNet:
    """CIFAR-stem ResNet-18, 512 pooled features."""
    return ResNet((2, 2, 2, 2), BasicBlock, stem="cifar", **kwargs)


def cifar_resnet20(**kwargs) -> ResNet:
    """CIFAR-stem ResNet-20 of width 16, 64 pooled features."""
    return ResNet((3, 3, 3), BasicBlock, width=16, stem="cifar", **kwargs)
