"""AMDIM's encoder for 128-pixel images (Bachman et al. 2019, arXiv:1906.00910)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ur_jax.encoders.networks.forms import relu
from ur_jax.encoders.networks.layers import Conv, average_pool, global_average
from ur_jax.types import Array

# (width in units of the first layer's, kernel size, stride) of each residual block.
_BLOCKS = ((2, 4, 2), (4, 4, 2), (8, 2, 2), (8, 3, 1), (8, 3, 1))


class ResidualUnit(nn.Module):
    """Convolution, ReLU, 1x1 convolution, and a shortcut that has no parameters.

    The shortcut averages over the convolution's window and pads the channels by zeros.
    """

    features: int
    kernel_size: int = 1
    strides: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shortcut = average_pool(x, self.kernel_size, self.strides) if self.kernel_size > 1 else x
        missing = self.features - x.shape[-1]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, missing)))
        y = Conv(self.features, self.kernel_size, self.strides, name="conv1")(x)
        return Conv(self.features, 1, name="conv2")(relu(y)) + shortcut


class AMDIM(nn.Module):
    """AMDIM's encoder up to its pooled global features r1; all convolutions are valid ones.

    The BatchNorms inside the published file's blocks were switched off; only the one at the end is
    applied. It is here an inference-time scale and shift, all four tensors among the parameters:
    nothing precedes it that it could be folded into, and it commutes with the pooling.

    Attributes:
      width: channels of the first layer (ndf).
      dimension: of the features (n_rkhs), at least 8 * width.
      depth: residual units in a block (n_depth).
    """

    width: int = 256
    dimension: int = 2048
    depth: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Maps images (B,H,W,3) to features (B, dimension)."""
        x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
        x = relu(Conv(self.width, 5, 2, use_bias=True, name="stem1")(x))
        x = relu(Conv(self.width, 3, use_bias=True, name="stem2")(x))
        for block, (factor, kernel_size, strides) in enumerate(_BLOCKS, start=1):
            features = factor * self.width
            x = ResidualUnit(features, kernel_size, strides, name=f"block{block}_unit0")(x)
            for unit in range(1, self.depth):
                x = ResidualUnit(features, name=f"block{block}_unit{unit}")(x)
        x = ResidualUnit(self.dimension, 3, name="last_unit")(x)
        return FrozenNorm(name="last_norm")(global_average(x))


class FrozenNorm(nn.Module):
    """BatchNorm in inference mode, its statistics held as constants among the parameters."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        constant = lambda name, init: self.param(name, init, x.shape[-1:]).astype(jnp.float32)
        mean, var = jax.lax.stop_gradient((constant("mean", zeros), constant("var", ones)))
        gain = constant("scale", ones) * jax.lax.rsqrt(var + self.eps)
        return ((x.astype(jnp.float32) - mean) * gain + constant("bias", zeros)).astype(x.dtype)
