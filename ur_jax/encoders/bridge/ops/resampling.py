"""Resizing of (B,C,H,W): a product with a matrix of weights along each axis."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from ur_jax.encoders.bridge.ops.table import narrow, row, sized

_LINEAR = (
    "(Tensor input, SymInt[]? output_size, bool align_corners, float[]? scale_factors) -> Tensor"
)


def _triangle(x):
    return np.maximum(1.0 - np.abs(x), 0.0)


def _cubic(a):
    """Keys' kernel; PyTorch's a is -3/4, and -1/2 where it low-pass filters (antialias)."""

    def kernel(x):
        x = np.abs(x)
        inner = ((a + 2) * x - (a + 3)) * x * x + 1
        outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))

    return kernel


def _scale(n, m, align_corners, factor):
    """Source pixels per target pixel."""
    if align_corners:
        return (n - 1) / (m - 1) if m > 1 else 0.0
    return 1.0 / factor if factor else n / m


def _matrix(n, m, align_corners, factor, kernel, support):
    """Weights (m, n) of interpolation: a target pixel reads the source at its centre."""
    scale = _scale(n, m, align_corners, factor)
    centres = np.arange(m) * scale if align_corners else (np.arange(m) + 0.5) * scale - 0.5
    if support == 1 and not align_corners:
        centres = np.maximum(centres, 0.0)
    first = np.floor(centres).astype(int)
    weights = np.zeros((m, n))
    for offset in range(1 - support, support + 1):
        at = first + offset
        np.add.at(weights, (np.arange(m), np.clip(at, 0, n - 1)), kernel(centres - at))
    return weights


def _matrix_antialias(n, m, align_corners, factor, kernel, support):
    """Weights (m, n) with the kernel widened where the image shrinks, normalised."""
    scale = _scale(n, m, align_corners, factor)
    stretch = max(scale, 1.0)
    weights = np.zeros((m, n))
    for i in range(m):
        centre = scale * (i + 0.5)
        low = max(int(centre - support * stretch + 0.5), 0)
        high = min(int(centre + support * stretch + 0.5), n)
        values = kernel((np.arange(low, high) - centre + 0.5) / stretch)
        weights[i, low:high] = values / values.sum()
    return weights


def _resized(input, output_size, scale_factors, matrix):
    """A product along each of the last two axes."""
    shape = input.shape[2:]
    if output_size is None:
        output_size = [math.floor(n * f) for n, f in zip(shape, scale_factors)]
    factors = scale_factors or (None, None)
    sized(*input.shape[:2], *output_size)
    sized(max(shape), max(output_size))
    down, across = (
        jnp.asarray(matrix(n, m, f), jnp.float32) for n, m, f in zip(shape, output_size, factors)
    )
    x, down, across = narrow(input, down, across)
    return jnp.einsum("mh,bchw,nw->bcmn", down, x, across)


@row(f"aten::upsample_bilinear2d.vec{_LINEAR}")
def bilinear(input, output_size, align_corners, scale_factors):
    matrix = lambda n, m, f: _matrix(n, m, align_corners, f, _triangle, 1)
    return _resized(input, output_size, scale_factors, matrix)


@row(f"aten::upsample_bicubic2d.vec{_LINEAR}")
def bicubic(input, output_size, align_corners, scale_factors):
    matrix = lambda n, m, f: _matrix(n, m, align_corners, f, _cubic(-0.75), 2)
    return _resized(input, output_size, scale_factors, matrix)


@row(f"aten::_upsample_bilinear2d_aa.vec{_LINEAR}")
def bilinear_antialias(input, output_size, align_corners, scale_factors):
    matrix = lambda n, m, f: _matrix_antialias(n, m, align_corners, f, _triangle, 1)
    return _resized(input, output_size, scale_factors, matrix)


@row(f"aten::_upsample_bicubic2d_aa.vec{_LINEAR}")
def bicubic_antialias(input, output_size, align_corners, scale_factors):
    matrix = lambda n, m, f: _matrix_antialias(n, m, align_corners, f, _cubic(-0.5), 2)
    return _resized(input, output_size, scale_factors, matrix)


@row(
    "aten::upsample_nearest2d.vec(Tensor input, SymInt[]? output_size, float[]? scale_factors) -> Tensor"
)
def nearest(input, output_size, scale_factors):
    if output_size is None:
        output_size = [math.floor(n * f) for n, f in zip(input.shape[2:], scale_factors)]
    sized(*input.shape[:2], *output_size)
    for axis, (m, factor) in enumerate(zip(output_size, scale_factors or (None, None)), 2):
        n = input.shape[axis]
        scale = np.float32(1.0 / factor) if factor else np.float32(n) / np.float32(m)
        at = np.minimum(np.floor(np.arange(m, dtype=np.float32) * scale).astype(int), n - 1)
        input = jnp.take(input, at, axis)
    return input
