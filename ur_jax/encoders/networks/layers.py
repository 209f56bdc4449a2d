"""Layers of the encoders: they compute in the dtype of their input, normalise in float32.

A network is written once with `folded` as a flag: unfolded it has BatchNorm with its statistics, as
training needs; folded it has a bias in each convolution instead, as inference wants, since XLA then
fuses convolution, bias and ReLU. `fold_batch_norm` turns the variables of one into the other's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur_jax.encoders.networks.forms import Padding, convolution_2d
from ur_jax.types import Array

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_dense_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class Conv(nn.Module):
    """2-D convolution of (B,H,W,C); a 1x1 convolution is a dot product."""

    features: int
    kernel_size: int
    strides: int = 1
    padding: Padding = "VALID"
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, stride = self.kernel_size, self.strides
        kernel = self.param("kernel", _conv_init, (size, size, x.shape[-1], self.features))
        kernel = kernel.astype(x.dtype)
        padding = ((0, 0), (0, 0)) if self.padding == "VALID" else tuple(self.padding)
        x = convolution_2d(x, kernel, stride, padding, x.shape)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return x


class Dense(nn.Module):
    """Linear layer on the last axis."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", _dense_init, (x.shape[-1], self.features))
        x = x @ kernel.astype(x.dtype)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return x


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Settings of a BatchNorm.

    Attributes:
      affine: whether it has a trained scale and bias.
      eps: added to the variance.
      momentum: share of the new statistics in the running ones.
      group_size: in training, number of examples that share statistics; None for the whole batch.
    """

    affine: bool = True
    eps: float = 1e-5
    momentum: float = 0.1
    group_size: int | None = None


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as PyTorch defines it.

    With `train` the batch is divided into consecutive groups of `group_size` examples, each
    normalised by its own mean and biased variance; the running statistics move by `momentum`
    towards the mean and the UNBIASED variance of a group, averaged over the groups.
    """

    config: NormConfig = NormConfig()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        config = self.config
        channels = x.shape[-1]
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        dtype = x.dtype
        x = x.astype(jnp.float32)
        if train:
            group_size = config.group_size or x.shape[0]
            groups = x.reshape(-1, group_size, *x.shape[1:])
            axes = tuple(range(1, groups.ndim - 1))
            count = groups.size // (groups.shape[0] * channels)
            used_mean = groups.mean(axes)
            used_var = groups.var(axes)
            if not self.is_initializing():
                unbiased = used_var * (count / max(count - 1, 1))
                mean.value += config.momentum * (used_mean.mean(0) - mean.value)
                var.value += config.momentum * (unbiased.mean(0) - var.value)
            per_group = (-1, *(1,) * (x.ndim - 1), channels)
        else:
            groups, used_mean, used_var, per_group = x, mean.value, var.value, (channels,)
        scale = jax.lax.rsqrt(used_var + config.eps)
        shift = -used_mean * scale
        if config.affine:
            gain = self.param("scale", nn.initializers.ones, (channels,)).astype(jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(jnp.float32)
            scale, shift = scale * gain, shift * gain + bias
        y = groups * scale.reshape(per_group) + shift.reshape(per_group)
        return y.reshape(x.shape).astype(dtype)


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm; folded: one convolution with bias."""

    features: int
    kernel_size: int
    strides: int = 1
    padding: Padding = "VALID"
    folded: bool = False
    norm: NormConfig = NormConfig()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = Conv(
            self.features, self.kernel_size, self.strides, self.padding, self.folded, name="conv"
        )(x)
        return x if self.folded else BatchNorm(self.norm, name="norm")(x, train)


class DenseNorm(nn.Module):
    """Linear layer, then BatchNorm; folded: one linear layer with bias."""

    features: int
    use_bias: bool = False
    folded: bool = False
    norm: NormConfig = NormConfig()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = Dense(self.features, self.use_bias or self.folded, name="dense")(x)
        return x if self.folded else BatchNorm(self.norm, name="norm")(x, train)


def fold_batch_norm(variables: Mapping[str, Any], eps: float = 1e-5) -> dict[str, Any]:
    """Folds each BatchNorm into the convolution or linear layer before it.

    With s = scale / sqrt(var + eps): kernel <- kernel * s, bias <- (bias - mean) * s + shift.

    Args:
      variables: {"params", "batch_stats"} of a network with `folded=False`.
      eps: the eps of its BatchNorms.

    Returns:
      {"params"} of the same network with `folded=True`; nothing is left of batch_stats.
    """

    def fold(params, stats):
        if "norm" in params or "norm" in stats:
            (kind,) = {"conv", "dense"} & set(params)
            layer, affine, norm = params[kind], params.get("norm", {}), stats["norm"]
            gain = affine.get("scale", 1.0) * (norm["var"] + eps) ** -0.5
            bias = (layer.get("bias", 0.0) - norm["mean"]) * gain + affine.get("bias", 0.0)
            return {kind: {"kernel": layer["kernel"] * gain, "bias": bias}}
        return {
            name: fold(node, stats.get(name, {})) if isinstance(node, Mapping) else node
            for name, node in params.items()
        }

    return {"params": fold(variables["params"], variables.get("batch_stats", {}))}


def average_pool(x: Array, size: int, strides: int) -> Array:
    """Mean over size x size windows of (B,H,W,C), without padding."""
    total = nn.pooling.pool(x, 0.0, jax.lax.add, (size, size), (strides, strides), "VALID")
    return total / float(size * size)


def global_average(x: Array) -> Array:
    """Mean over height and width (B,H,W,C) -> (B,C), summed in float32."""
    return x.mean((1, 2), dtype=jnp.float32).astype(x.dtype)
