"""2-D convolutions of (B,H,W,C), in the forms that CPUs have fast kernels for, also inside loops.

XLA's CPU compiler brings convolutions into the form of its fast kernels in the entry computation only;
a gradient by the input inside an attack's loop stays slow, and grouped convolutions are slow everywhere.
So reverse mode is written out, as in `networks.forms`, whose convolution takes those that it can.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ur_jax.encoders.networks.forms import convolution_2d
from ur_jax.encoders.networks.forms import max_pool_3x3 as max_pool_3x3
from ur_jax.types import Array

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv(x: Array, kernel: Array, stride: Pair, pads: Pads, dilation: Pair, groups: int) -> Array:
    """The convolution of x (B,H,W,C) with a kernel (k,k',C/groups,features)."""
    size = kernel.shape[:2]
    dense = groups == 1 and dilation == (1, 1)
    if dense and pads == ((0, 0), (0, 0)):
        if size == (1, 1):
            return x[:, :: stride[0], :: stride[1]] @ kernel[0, 0]
        if size == stride:
            return _patches(x, kernel)
    return convolved(x, kernel, stride, pads, dilation, groups)


def convolved(
    x: Array, kernel: Array, stride: Pair, pads: Pads, dilation: Pair, groups: int
) -> Array:
    """The same, as a convolution whatever its size."""
    size = kernel.shape[:2]
    is_square = size[0] == size[1] > 1 and stride[0] == stride[1]
    if groups == 1 and dilation == (1, 1) and is_square:
        return convolution_2d(x, kernel, stride[0], pads, x.shape)
    return _conv(x, kernel, stride, pads, dilation, groups, x.shape)


def _patches(x: Array, kernel: Array) -> Array:
    """A convolution whose stride is its size: one dot product per patch."""
    (high, wide), (batch, height, width, channels) = kernel.shape[:2], x.shape
    rows, columns = height // high, width // wide
    x = x[:, : rows * high, : columns * wide].reshape(batch, rows, high, columns, wide, channels)
    x = x.swapaxes(2, 3).reshape(batch, rows, columns, high * wide * channels)
    return x @ kernel.reshape(-1, kernel.shape[-1])


def _plain(x, kernel, stride, pads, dilation, groups, within=(1, 1)):
    """As JAX has it."""
    return jax.lax.conv_general_dilated(
        x, kernel, stride, pads, within, dilation, _DIMENSIONS, groups
    )


def _taps(x, kernel, stride, pads, dilation, groups, within=(1, 1)):
    """A grouped convolution as one product per tap of the kernel; of single channels elementwise."""
    size, channels, features = kernel.shape[:2], x.shape[-1], kernel.shape[-1]
    spaces = [(low, high, within[i] - 1) for i, (low, high) in enumerate(pads)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spaces, (0, 0, 0)])
    counts = [
        (n - d * (m - 1) - 1) // s + 1
        for n, m, d, s in zip(x.shape[1:3], size, dilation, stride, strict=True)
    ]
    single = channels == groups == features
    kernel = kernel.reshape(*size, channels // groups, groups, features // groups)
    total = None
    for i in range(size[0]):
        for j in range(size[1]):
            starts = (i * dilation[0], j * dilation[1])
            part = x[
                :,
                starts[0] : starts[0] + (counts[0] - 1) * stride[0] + 1 : stride[0],
                starts[1] : starts[1] + (counts[1] - 1) * stride[1] + 1 : stride[1],
            ]
            if single:
                product = part * kernel[i, j].reshape(-1)
            else:
                grouped = part.reshape(*part.shape[:3], groups, channels // groups)
                product = jnp.einsum("bhwgi,igo->bhwgo", grouped, kernel[i, j])
            total = product if total is None else total + product
    assert total is not None
    return total.reshape(x.shape[0], *counts, features)


def _either(x, kernel, stride, pads, dilation, groups, within=(1, 1)):
    """By taps where that is faster: with groups, on CPUs."""
    arguments = (stride, pads, dilation, groups, within)
    if groups == 1:
        return _plain(x, kernel, *arguments)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _taps(x, kernel, *arguments),
        default=lambda x, kernel: _plain(x, kernel, *arguments),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _conv(x, kernel, stride, pads, dilation, groups, shape):
    """The convolution of x, whose shape is `shape`."""
    return _either(x, kernel, stride, pads, dilation, groups)


def _forward(x, kernel, stride, pads, dilation, groups, shape):
    """Keeps only what the gradients that are asked for need."""
    kept = (x.value if kernel.perturbed else None, kernel.value, x.perturbed or None)
    return _either(x.value, kernel.value, stride, pads, dilation, groups), kept


def _backward(stride, pads, dilation, groups, shape, residuals, grad):
    """Gradients by x and by the kernel, where they are asked for."""
    x, kernel, wants_input = residuals
    by_x = by_kernel = None
    if isinstance(grad, SymbolicZero):
        return None, None
    if wants_input is not None:
        arguments = (stride, pads, dilation, groups)
        by_x = jax.lax.platform_dependent(
            kernel,
            grad,
            cpu=lambda kernel, grad: _by_x(kernel, grad, shape, *arguments),
            default=lambda kernel, grad: jax.linear_transpose(
                lambda x: _plain(x, kernel, *arguments), jax.ShapeDtypeStruct(shape, grad.dtype)
            )(grad)[0],
        )
    if x is not None:
        plain = lambda kernel: _plain(x, kernel, stride, pads, dilation, groups)
        by_kernel = jax.vjp(plain, kernel)[1](grad)[0]
    return by_x, by_kernel


def _by_x(kernel, grad, shape, stride, pads, dilation, groups):
    """A convolution of the dilated gradient with the turned kernel, in the forward's layout."""
    *size, inner, features = kernel.shape
    parts = kernel.reshape(*size, inner, groups, features // groups)
    turned = jnp.flip(parts, (0, 1)).transpose(0, 1, 4, 3, 2)  # (k,k',features/groups,groups,inner)
    turned = turned.reshape(*size, features // groups, groups * inner)
    # The barrier keeps XLA from moving the transposition back into the convolution's layout.
    turned = jax.lax.optimization_barrier(turned)
    ends = []
    for n, k, s, d, (low, high) in zip(shape[1:3], size, stride, dilation, pads, strict=True):
        span = d * (k - 1)
        ends.append((span - low, span - high + (n + low + high - span - 1) % s))
    return _either(grad, turned, (1, 1), tuple(ends), dilation, groups, within=stride)


_conv.defvjp(_forward, _backward, symbolic_zeros=True)
