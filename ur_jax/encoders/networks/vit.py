"""Vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929) with a class token.

MAE (He et al. 2022, arXiv:2111.06377) and MoCo v3 (Chen et al. 2021, arXiv:2104.02057) use them.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.encoders.networks.forms import attention, gelu
from ur_jax.encoders.networks.layers import Dense
from ur_jax.errors import UserError
from ur_jax.types import Array


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, eps 1e-6, computed in float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        centred = x.astype(jnp.float32)
        centred = centred - centred.mean(-1, keepdims=True)
        variance = jnp.mean(centred**2, -1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + 1e-6) * scale + bias).astype(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with the exact GELU.

    Attributes:
      num_heads: attention heads.
      first_only: returns the first token alone, (B,1,dim), and computes no other.
      mlp_ratio: width of the hidden layer over that of a token.
    """

    num_heads: int
    first_only: bool = False
    mlp_ratio: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, dim = x.shape
        qkv = Dense(3 * dim, name="qkv")(LayerNorm(name="norm1")(x))
        query, key, value = jnp.moveaxis(
            qkv.reshape(batch, length, 3, self.num_heads, dim // self.num_heads), 2, 0
        )
        if self.first_only:
            x, query = x[:, :1], query[:, :1]
        mixed = attention(query, key, value)
        x = x + Dense(dim, name="mix")(mixed.reshape(x.shape))
        hidden = Dense(self.mlp_ratio * dim, name="expand")(LayerNorm(name="norm2")(x))
        return x + Dense(dim, name="contract")(gelu(hidden))


class ViT(nn.Module):
    """A vision transformer up to its class token.

    Images of another size than `image_size` are taken too: the position table is then resized,
    see `resize_positions`.

    Attributes:
      dim: width of a token.
      depth: number of blocks.
      num_heads: attention heads in a block; divides `dim`.
      patch_size: side of a patch in pixels.
      image_size: side of the square images that the position table belongs to, in pixels.
      fixed_positions: the sin-cos table, without a gradient, instead of a learned one.
      freeze_patches: no gradient for the patch embedding either (as MoCo v3 trains).
    """

    dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    image_size: int = 224
    fixed_positions: bool = False
    freeze_patches: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Maps images (B,H,W,3) to the normalised class token (B,dim)."""
        size = self.patch_size
        batch, height, width, channels = x.shape
        if height % size or width % size:
            raise UserError(
                f"Expected image height and width divisible by the patch size {size}, got "
                f"{height}x{width}; resize the images."
            )
        if self.dim % self.num_heads:
            raise UserError(
                f"Expected dim divisible by num_heads, got {self.dim} and {self.num_heads}."
            )
        grid = (height // size, width // size)
        # A convolution whose stride is its size is one dot product per patch.
        patches = x.reshape(batch, grid[0], size, grid[1], size, channels).swapaxes(2, 3)
        patches = patches.reshape(batch, grid[0] * grid[1], size * size * channels)
        xavier = nn.initializers.xavier_uniform()
        kernel = self.param("patch_kernel", xavier, (patches.shape[-1], self.dim))
        bias = self.param("patch_bias", nn.initializers.zeros, (self.dim,))
        if self.freeze_patches:
            kernel, bias = jax.lax.stop_gradient((kernel, bias))
        tokens = patches @ kernel.astype(x.dtype) + bias.astype(x.dtype)
        class_token = self.param("class_token", nn.initializers.normal(0.02), (self.dim,))
        class_token = jnp.broadcast_to(class_token.astype(x.dtype), (batch, 1, self.dim))
        tokens = jnp.concatenate([class_token, tokens], axis=1)
        tokens = tokens + self._positions(grid).astype(x.dtype)
        for index in range(self.depth):
            last = index == self.depth - 1  # whose other tokens nobody reads
            tokens = Block(self.num_heads, first_only=last, name=f"block{index}")(tokens)
        return LayerNorm(name="final_norm")(tokens[:, 0])

    def _positions(self, grid: tuple[int, int]) -> Array:
        """The position table (1 + h w, dim) float32 for this grid of patches."""
        native = (self.image_size // self.patch_size, self.image_size // self.patch_size)
        if self.fixed_positions:
            init = lambda key, shape, dtype=None: jnp.asarray(sincos_positions(*native, self.dim))
        else:
            init = nn.initializers.normal(0.02)
        table = self.param("positions", init, (1 + native[0] * native[1], self.dim))
        table = jax.lax.stop_gradient(table) if self.fixed_positions else table
        return resize_positions(table.astype(jnp.float32), native, grid)


def sincos_positions(height: int, width: int, dim: int) -> np.ndarray:
    """MoCo v3's fixed position table: a zero row, then one row per patch, row by row.

    Patch (r, c) has [sin(r w), cos(r w), sin(c w), cos(c w)], w_j = 10000^(-j / (dim / 4)). The row
    comes first, although MoCo v3's code calls that axis the width.

    Args:
      height: number of patches in a column.
      width: number of patches in a row.
      dim: width of a token, divisible by 4.

    Returns:
      The table (1 + height * width, dim) float32.

    Raises:
      ValueError: if `dim` is not divisible by 4.
    """
    if dim % 4:
        raise UserError(f"Expected dim divisible by 4 for sin-cos positions, got {dim}.")
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = (index.reshape(-1, 1) * frequencies for index in np.mgrid[:height, :width])
    table = np.concatenate([np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)], axis=1)
    return np.concatenate([np.zeros((1, dim)), table]).astype(np.float32)


def resize_positions(table: Array, native: tuple[int, int], grid: tuple[int, int]) -> Array:
    """Resizes a position table to another grid of patches, bicubically, but for the class token.

    The cubic kernel is Keys' with a = -1/2 (`jax.image.resize`, low-pass filtered when shrinking);
    PyTorch's has a = -3/4, so that representations at other image sizes than the native one differ
    slightly from a PyTorch model's.

    Args:
      table: (1 + h w, dim).
      native: its grid (h, w).
      grid: the wanted one (h', w').

    Returns:
      The table (1 + h' w', dim); `table` itself if the grids are equal.
    """
    if native == grid:
        return table
    dim = table.shape[-1]
    patches = jax.image.resize(table[1:].reshape(*native, dim), (*grid, dim), "cubic")
    return jnp.concatenate([table[:1], patches.reshape(-1, dim)])


def vit_small(num_heads: int = 6, **kwargs) -> ViT:
    """ViT-S/16; MoCo v3's has 12 heads."""
    return ViT(384, 12, num_heads, **kwargs)


def vit_base(**kwargs) -> ViT:
    """ViT-B/16."""
    return ViT(768, 12, 12, **kwargs)


def vit_large(**kwargs) -> ViT:
    """ViT-L/16."""
    return ViT(1024, 24, 16, **kwargs)
