"""Layers: products, convolutions, normalisations, pooling, attention.

Products are in bfloat16 if an operand is; normalisations and softmax are computed in float32.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.encoders.bridge.ops import convolution
from ur_jax.encoders.bridge.ops.table import narrow, row, sized
from ur_jax.encoders.networks import forms


@row("aten::linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
def linear(input, weight, bias=None):
    input, weight, bias = narrow(input, weight, bias)
    result = jax.lax.dot_general(input, weight, (((input.ndim - 1,), (1,)), ((), ())))
    return result if bias is None else result + bias


@row(
    "aten::mm(Tensor self, Tensor mat2) -> Tensor", "aten::bmm(Tensor self, Tensor mat2) -> Tensor"
)
def mm(self, mat2):
    return jnp.matmul(*narrow(self, mat2))


@row("aten::matmul(Tensor self, Tensor other) -> Tensor")
def matmul(self, other):
    return jnp.matmul(*narrow(self, other))


@row(
    "aten::addmm(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor"
)
def addmm(self, mat1, mat2, beta=1, alpha=1):
    self, mat1, mat2 = narrow(self, mat1, mat2)
    return beta * self + alpha * jnp.matmul(mat1, mat2)


@row(
    "aten::baddbmm(Tensor self, Tensor batch1, Tensor batch2, *, Scalar beta=1, Scalar alpha=1) -> Tensor"
)
def baddbmm(self, batch1, batch2, beta=1, alpha=1):
    return addmm(self, batch1, batch2, beta, alpha)


@row("aten::convolution(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
     "SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor")  # fmt: skip
def convolve(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    """Of any number of axes, channels second; of two axes the passes make `ur.conv2d`."""
    input, weight, bias = narrow(input, weight, bias)
    rank = input.ndim - 2
    spread = lambda x: tuple(x) * (rank if len(x) == 1 else 1)
    stride, padding, dilation = spread(stride), spread(padding), spread(dilation)
    pads, within = [(p, p) for p in padding], (1,) * rank
    if transposed:
        ends = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding)]
        pads = [(e, e + more) for e, more in zip(ends, spread(output_padding))]
        stride, within = within, stride
        # (in, out/groups, ...) -> (out, in/groups, ...), turned
        parts = jnp.reshape(weight, (groups, -1, *weight.shape[1:])).swapaxes(1, 2)
        weight = jnp.reshape(parts, (-1, *parts.shape[2:]))
        weight = jnp.flip(weight, tuple(range(2, rank + 2)))
    axes = "DHW"[-rank:]
    result = jax.lax.conv_general_dilated(
        input, weight, stride, pads, within, dilation,
        (f"NC{axes}", f"OI{axes}", f"NC{axes}"), groups,
    )  # fmt: skip
    return result if bias is None else result + bias.reshape(-1, *(1,) * rank)


@row("ur::conv2d(Tensor input, Tensor kernel, Tensor? bias, int[2] stride, int[2] padding, "
     "int[2] dilation, int groups) -> Tensor")  # fmt: skip
def conv2d(input, kernel, bias, stride, padding, dilation, groups):
    """Of (B,H,W,C) with a kernel HWIO."""
    input, kernel, bias = narrow(input, kernel, bias)
    pads = ((padding[0], padding[0]), (padding[1], padding[1]))
    result = convolution.conv(input, kernel, tuple(stride), pads, tuple(dilation), groups)
    return result if bias is None else result + bias


@row("aten::native_layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, "
     "float eps) -> (Tensor, Tensor, Tensor)")  # fmt: skip
def native_layer_norm(input, normalized_shape, weight, bias, eps):
    return (layer_norm(input, normalized_shape, weight, bias, eps),)


@row("aten::layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, "
     "Tensor? bias=None, float eps=1e-05, bool cudnn_enable=True) -> Tensor")  # fmt: skip
def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    axes = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalised(input, axes, eps), weight, bias).astype(input.dtype)


def _normalised(x, axes, eps):
    """(x - mean) / sqrt(variance + eps) over axes, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + eps)


def _affine(x, weight, bias):
    """x * weight + bias, of those that there are."""
    x = x if weight is None else x * weight.astype(jnp.float32)
    return x if bias is None else x + bias.astype(jnp.float32)


@row("ur::normalize(Tensor self, int[] dim, float eps) -> Tensor")
def normalize(self, dim, eps):
    """(self - mean) / sqrt(variance + eps) over axes: a LayerNorm that was written out."""
    return _normalised(self, tuple(dim), eps).astype(self.dtype)


@row(
    "aten::rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor"
)
def rms_norm(input, normalized_shape, weight=None, eps=None):
    axes, x = tuple(range(-len(normalized_shape), 0)), input.astype(jnp.float32)
    eps = np.finfo(np.float32).eps if eps is None else eps
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + eps)
    return _affine(x, weight, None).astype(input.dtype)


@row("aten::group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, "
     "float eps=1e-05, bool cudnn_enabled=True) -> Tensor")  # fmt: skip
def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    x = jnp.reshape(input, (input.shape[0], num_groups, -1))
    x = jnp.reshape(_normalised(x, -1, eps), input.shape)
    spread = lambda v: None if v is None else v.reshape(-1, *(1,) * (input.ndim - 2))
    return _affine(x, spread(weight), spread(bias)).astype(input.dtype)


@row("aten::native_group_norm(Tensor input, Tensor? weight, Tensor? bias, SymInt N, SymInt C, "
     "SymInt HxW, int group, float eps) -> (Tensor, Tensor, Tensor)")  # fmt: skip
def native_group_norm(input, weight, bias, N, C, HxW, group, eps):
    return (group_norm(input, group, weight, bias, eps),)


@row("aten::_native_batch_norm_legit_no_training(Tensor input, Tensor? weight, Tensor? bias, "
     "Tensor running_mean, Tensor running_var, float momentum, float eps) -> (Tensor, Tensor, Tensor)")  # fmt: skip
def batch_norm(input, weight, bias, running_mean, running_var, momentum, eps):
    spread = lambda v: None if v is None else v.reshape(-1, *(1,) * (input.ndim - 2))
    variance = running_var.astype(jnp.float32) + eps
    x = (input.astype(jnp.float32) - spread(running_mean)) * spread(jax.lax.rsqrt(variance))
    return (_affine(x, spread(weight), spread(bias)).astype(input.dtype),)


@row("aten::scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
     "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor")  # fmt: skip
def sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """softmax(query key' scale + mask) value over the last two axes, (..., heads, length, width)."""
    query, key, value = narrow(query, key, value)
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (jnp.repeat(x, repeats, -3) for x in (key, value))
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (
        jnp.einsum("...td,...sd->...ts", query, key, preferred_element_type=jnp.float32) * scale
    )
    if is_causal:
        logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, -jnp.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == bool
        logits = jnp.where(attn_mask, logits, -jnp.inf) if is_bool else logits + attn_mask
    weights = jax.nn.softmax(logits, -1).astype(value.dtype)
    return jnp.einsum("...ts,...sd->...td", weights, value)


@row(
    "ur::attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale) -> Tensor"
)
def attention(query, key, value, mask=None, is_causal=False, scale=None):
    """Of (batch, length, heads, width), as JAX's own attention has them."""
    query, key, value = narrow(query, key, value)
    is_plain = mask is None and not is_causal and query.dtype == key.dtype == value.dtype
    if is_plain and (scale is None or math.isclose(scale, query.shape[-1] ** -0.5)):
        return forms.attention(query, key, value)
    kinds: dict[str, Any] = {}
    if mask is not None:
        mask = jnp.reshape(mask, (*(1,) * (4 - mask.ndim), *mask.shape))
        kinds = {"mask": mask} if mask.dtype == bool else {"bias": mask.astype(query.dtype)}
    return jax.nn.dot_product_attention(
        query, key, value, scale=scale, is_causal=is_causal, **kinds
    )


def _windows(size, stride, padding, dilation, shape, ceil_mode):
    """Padding (low, high) of two axes so that all windows fit, and how far beyond PyTorch's."""
    pads = []
    for k, s, p, d, n in zip(size, stride, padding, dilation, shape, strict=True):
        span = d * (k - 1) + 1
        room = n + 2 * p - span
        count = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (count - 1) * s >= n + p:
            count -= 1  # the last window would begin in the padding
        pads.append((p, max((count - 1) * s + span - n - p, 0)))
    return pads


def _pair(x, otherwise=None):
    x = list(x) if isinstance(x, (list, tuple)) else [x]
    x = x or list(otherwise or ())
    return tuple(x) * (2 // len(x))


def _max_pool(x, kernel_size, stride, padding, dilation, ceil_mode, axes):
    """The maximum over windows along two axes."""
    size = _pair(kernel_size)
    stride, padding, dilation = _pair(stride, size), _pair(padding), _pair(dilation)
    shape = [x.shape[a] for a in axes]
    last = axes == (1, 2) and x.ndim == 4
    if last and (size, stride, padding, dilation) == ((3, 3), (2, 2), (1, 1), (1, 1)):
        if not ceil_mode or _windows(size, stride, padding, dilation, shape, True) == _windows(
            size, stride, padding, dilation, shape, False
        ):
            return convolution.max_pool_3x3(x)
    pads = _windows(size, stride, padding, dilation, shape, ceil_mode)
    return jax.lax.reduce_window(
        x, _lowest(x.dtype), jax.lax.max, _spread(size, axes, x.ndim, 1),
        _spread(stride, axes, x.ndim, 1), _spread(pads, axes, x.ndim, (0, 0)),
        window_dilation=_spread(dilation, axes, x.ndim, 1),
    )  # fmt: skip


def _lowest(dtype):
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _spread(values: Any, axes: tuple[int, ...], rank: int, otherwise: Any) -> Any:
    """A value for each axis."""
    return tuple(values[axes.index(a)] if a in axes else otherwise for a in range(rank))


@row("aten::max_pool2d_with_indices(Tensor self, int[2] kernel_size, int[2] stride=[], "
     "int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) -> (Tensor, Tensor)")  # fmt: skip
def max_pool2d_with_indices(
    self, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False
):
    return (max_pool2d(self, kernel_size, stride, padding, dilation, ceil_mode),)


@row("aten::max_pool2d(Tensor self, int[2] kernel_size, int[2] stride=[], int[2] padding=0, "
     "int[2] dilation=1, bool ceil_mode=False) -> Tensor")  # fmt: skip
def max_pool2d(self, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    axes = (self.ndim - 2, self.ndim - 1)
    return _max_pool(self, kernel_size, stride, padding, dilation, ceil_mode, axes)


@row("ur::max_pool2d(Tensor self, int[2] kernel_size, int[2] stride=[], int[2] padding=0, "
     "int[2] dilation=1, bool ceil_mode=False) -> Tensor")  # fmt: skip
def max_pool2d_last(self, kernel_size, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    """Of (B,H,W,C)."""
    return _max_pool(self, kernel_size, stride, padding, dilation, ceil_mode, (1, 2))


_AVERAGE = ("int[2] kernel_size, int[2] stride=[], int[2] padding=0, bool ceil_mode=False, "
            "bool count_include_pad=True, int? divisor_override=None) -> Tensor")  # fmt: skip


def _avg_pool(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor, axes):
    """The mean over windows along two axes; padding may count."""
    size = _pair(kernel_size)
    stride, padding = _pair(stride, size), _pair(padding)
    shape = [x.shape[a] for a in axes]
    pads = _windows(size, stride, padding, (1, 1), shape, ceil_mode)
    arguments = (_spread(size, axes, x.ndim, 1), _spread(stride, axes, x.ndim, 1))
    total = jax.lax.reduce_window(
        x.astype(jnp.float32), 0.0, jax.lax.add, *arguments, _spread(pads, axes, x.ndim, (0, 0))
    )
    if divisor is None:
        counts = []
        for k, s, p, n, m in zip(size, stride, padding, shape, [total.shape[a] for a in axes]):
            start = np.arange(m) * s - p
            end = np.minimum(start + k, n + p)
            if not count_include_pad:
                start, end = np.maximum(start, 0), np.minimum(end, n)
            counts.append(end - start)
        divisor = np.outer(*counts).astype(np.float32)
        divisor = divisor.reshape([total.shape[a] if a in axes else 1 for a in range(x.ndim)])
    return (total / divisor).astype(x.dtype)


@row(f"aten::avg_pool2d(Tensor self, {_AVERAGE}")
def avg_pool2d(self, kernel_size, stride=(), padding=(0,), ceil_mode=False, count_include_pad=True,
               divisor_override=None):  # fmt: skip
    axes = (self.ndim - 2, self.ndim - 1)
    return _avg_pool(
        self, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, axes
    )


@row(f"ur::avg_pool2d(Tensor self, {_AVERAGE}")
def avg_pool2d_last(self, kernel_size, stride=(), padding=(0,), ceil_mode=False,
                    count_include_pad=True, divisor_override=None):  # fmt: skip
    """Of (B,H,W,C)."""
    return _avg_pool(
        self, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, (1, 2)
    )


def _adaptive(x, output_size, axes, reduce, combine):
    """Window i of m from floor(i n / m) to ceil((i + 1) n / m), one axis after the other."""
    for axis, m in zip(axes, output_size, strict=True):
        n = x.shape[axis]
        m = n if m is None else m
        if n % m == 0:  # equal windows
            shape = (*x.shape[:axis], m, n // m, *x.shape[axis + 1 :])
            x = reduce(x.reshape(shape), axis + 1)
            continue
        ends = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        parts = [reduce(jax.lax.slice_in_dim(x, a, b, 1, axis), axis) for a, b in ends]
        x = combine(parts, axis)
    return x


def _adaptive_avg(x, output_size, axes):
    mean = lambda v, axis: v.mean(axis, dtype=jnp.float32)
    return _adaptive(x, output_size, axes, mean, jnp.stack).astype(x.dtype)


@row("aten::_adaptive_avg_pool2d(Tensor self, SymInt[2] output_size) -> Tensor",
     "aten::adaptive_avg_pool2d(Tensor self, SymInt[2] output_size) -> Tensor")  # fmt: skip
def adaptive_avg_pool2d(self, output_size):
    return _adaptive_avg(self, output_size, (self.ndim - 2, self.ndim - 1))


@row("aten::adaptive_avg_pool1d(Tensor self, int[1] output_size) -> Tensor")
def adaptive_avg_pool1d(self, output_size):
    return _adaptive_avg(self, output_size, (self.ndim - 1,))


@row("ur::adaptive_avg_pool2d(Tensor self, int[2] output_size) -> Tensor")
def adaptive_avg_pool2d_last(self, output_size):
    """Of (B,H,W,C)."""
    return _adaptive_avg(self, output_size, (1, 2))


@row("aten::adaptive_max_pool2d(Tensor self, int[2] output_size) -> (Tensor, Tensor)")
def adaptive_max_pool2d(self, output_size):
    axes = (self.ndim - 2, self.ndim - 1)
    return (_adaptive(self, output_size, axes, lambda v, axis: v.max(axis), jnp.stack),)


@row(
    "aten::im2col(Tensor self, int[2] kernel_size, int[2] dilation, int[2] padding, int[2] stride) -> Tensor"
)
def im2col(self, kernel_size, dilation, padding, stride):
    """(B,C,H,W) -> (B, C k k, windows)."""
    x = jnp.pad(self, ((0, 0), (0, 0), *((p, p) for p in padding)))
    taps = _taps(x.shape[2:], kernel_size, dilation, stride)
    parts = jnp.stack([x[:, :, rows, columns] for rows, columns in taps], 2)
    return parts.reshape(*x.shape[:1], x.shape[1] * len(taps), -1)


@row("aten::col2im(Tensor self, SymInt[2] output_size, int[2] kernel_size, int[2] dilation, "
     "int[2] padding, int[2] stride) -> Tensor")  # fmt: skip
def col2im(self, output_size, kernel_size, dilation, padding, stride):
    """The transposition of `im2col`."""
    full = tuple(n + 2 * p for n, p in zip(output_size, padding))
    taps = _taps(full, kernel_size, dilation, stride)
    batch, channels = self.shape[0], self.shape[1] // len(taps)
    counts = [(n - d * (k - 1) - 1) // s + 1
              for n, k, d, s in zip(full, kernel_size, dilation, stride)]  # fmt: skip
    parts = self.reshape(batch, channels, len(taps), *counts)
    x = jnp.zeros(sized(batch, channels, *full), self.dtype)
    for number, (rows, columns) in enumerate(taps):
        x = x.at[:, :, rows, columns].add(parts[:, :, number])
    (top, left), (height, width) = padding, output_size
    return x[:, :, top : top + height, left : left + width]


def _taps(shape, kernel_size, dilation, stride):
    """(rows, columns) of every tap of a window, as slices."""
    along = []
    for n, k, d, s in zip(shape, kernel_size, dilation, stride):
        count = (n - d * (k - 1) - 1) // s + 1
        along.append([slice(i * d, i * d + (count - 1) * s + 1, s) for i in range(k)])
    return [(rows, columns) for rows in along[0] for columns in along[1]]
