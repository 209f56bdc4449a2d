"""The forms in which layers compute, a choice per platform: here, and never in a network.

Each has its gradient written out, so that the platform chooses backwards too. On CPUs and TPUs the
forms are JAX's own, bit for bit, where nothing else is said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ur_jax.types import Array

Padding = tuple[tuple[int, int], ...] | str

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_NARROW = 16  # input channels times stride; a stem's


@jax.custom_vjp
def max_pool_3x3(x: Array) -> Array:
    """3x3 maximum with stride 2 and padding 1 of (B,H,W,C), the ImageNet stem's.

    Its gradient goes to the first maximum of a window. It is written out because off TPUs XLA
    carries four index arrays through the windows and then scatters: on a CPU that was 11 % of a
    U-PGD step of a ResNet-50, and this is 1 %. On TPUs XLA's own moves fewer bytes; on GPUs a
    third form does.
    """
    return _plain_max_pool(x)


def _max_pool(x: Array, size: Any, strides: Any, padding: Any) -> Array:
    """Flax's, whose declared types leave padding in numbers out."""
    return nn.max_pool(x, size, strides, padding)


def _plain_max_pool(x):
    """The pooling, differentiated as JAX does."""
    return _max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def _max_pool_forward(x):
    """Keeps what was pooled."""
    return max_pool_3x3(x), x


def _max_pool_backward(x, grad):
    """The gradient by x, as suits the platform."""
    native = lambda x, grad: jax.vjp(_plain_max_pool, x)[1](grad)[0]
    gpu = _max_pool_gradient_gpu
    by_x = jax.lax.platform_dependent(
        x, grad, tpu=native, cuda=gpu, rocm=gpu, default=_max_pool_gradient
    )
    return (by_x,)


def _max_pool_gradient(x: Array, grad: Array) -> Array:
    """One axis after the other: the first row that holds the maximum, there the first column."""
    by_columns = _max_pool(x, (1, 3), (1, 2), ((0, 0), (1, 1)))
    return _max_gradient_along(x, _max_gradient_along(by_columns, grad, axis=1), axis=2)


def _max_gradient_along(x: Array, grad: Array, axis: int) -> Array:
    """Sends each gradient to the first maximum of its window, 3 pixels of x along the axis."""
    length, windows = x.shape[axis], grad.shape[axis]
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (1, 2 * windows - length, 0)
    padded = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), pads)
    left, middle, right = (
        jax.lax.slice_in_dim(padded, i, i + 2 * windows - 1, 2, axis) for i in range(3)
    )
    zero = jnp.zeros((), grad.dtype)
    is_left = (left >= middle) & (left >= right)
    is_middle = ~is_left & (middle >= right)
    pads[axis] = (-1, 1, 0)  # an odd pixel is the left one of the next window
    to_left = jax.lax.pad(jnp.where(is_left, grad, zero), zero, pads)
    even = jnp.where(is_middle, grad, zero)
    odd = jnp.where(is_left | is_middle, zero, grad) + to_left
    shape = (*x.shape[:axis], 2 * windows, *x.shape[axis + 1 :])
    pixels = jnp.stack([even, odd], axis + 1).reshape(shape)
    return jax.lax.slice_in_dim(pixels, 0, length, axis=axis)


def _max_pool_gradient_gpu(x: Array, grad: Array) -> Array:
    """Where in its window the first maximum is, a byte, which each pixel then asks its windows."""
    height, width, rows, columns = *x.shape[1:3], *grad.shape[1:3]
    pads = ((0, 0), (1, 2 * rows - height), (1, 2 * columns - width), (0, 0))
    padded = jnp.pad(x, pads, constant_values=-jnp.inf)
    best, where = padded[:, : 2 * rows - 1 : 2, : 2 * columns - 1 : 2], jnp.uint8(0)
    for place in range(1, 9):
        top, left = divmod(place, 3)
        pixels = padded[:, top : top + 2 * rows - 1 : 2, left : left + 2 * columns - 1 : 2]
        where = jnp.where(pixels > best, jnp.uint8(place), where)
        best = jnp.maximum(best, pixels)
    where = jax.lax.optimization_barrier(where)
    later = lambda x, down, right, fill: jnp.pad(
        x, ((0, 0), (0, down), (0, right), (0, 0)), constant_values=fill
    )[:, down:, right:]
    zero = jnp.zeros((), grad.dtype)

    def phase(row, column):
        """The gradient of pixels (2a + row, 2b + column), from window (a,b) and, of odd ones, the
        next, of which they are the first row or column."""
        total = zero
        for down in range(row + 1):
            for right in range(column + 1):
                place = 3 * (1 + row - 2 * down) + 1 + column - 2 * right
                is_there = later(where, down, right, jnp.uint8(9)) == place
                total += jnp.where(is_there, later(grad, down, right, zero), zero)
        return total

    pixels = jnp.stack([jnp.stack([phase(row, 0), phase(row, 1)], 3) for row in (0, 1)], 2)
    pixels = pixels.reshape(x.shape[0], 2 * rows, 2 * columns, x.shape[3])
    return pixels[:, :height, :width]


max_pool_3x3.defvjp(_max_pool_forward, _max_pool_backward)


_TILE = 8  # tokens; the products of GPUs pad other lengths by a copy


@jax.custom_vjp
def attention(query: Array, key: Array, value: Array) -> Array:
    """Softmax attention (B,T,N,H) of query (B,T,N,H) to key and value (B,S,N,H), without a mask.

    On GPUs the tokens are padded once to what their products want, and the gradient keeps the
    softmax in the compute dtype; elsewhere it is JAX's own.
    """
    return _attention_forward(query, key, value)[0]


def _attention_forward(query, key, value):
    """The result, and what the gradient on GPUs needs: the softmax (B,N,T',S')."""
    batch, length, heads, _ = query.shape
    shape = (batch, heads, _tiled(length), _tiled(key.shape[1]))
    native = lambda *parts: (_plain_attention(*parts), jnp.zeros(shape, query.dtype))
    result, weights = jax.lax.platform_dependent(
        query, key, value, cuda=_padded_attention, rocm=_padded_attention, default=native
    )
    return result, (query, key, value, result, weights)


def _attention_backward(kept, grad):
    """The gradients by query, key and value, as suits the platform."""
    native = lambda query, key, value, result, weights, grad: jax.vjp(
        _plain_attention, query, key, value
    )[1](grad)  # XLA finds the forward pass again
    gradient = _padded_attention_gradient
    return jax.lax.platform_dependent(*kept, grad, cuda=gradient, rocm=gradient, default=native)


attention.defvjp(_attention_forward, _attention_backward)


def _plain_attention(query: Array, key: Array, value: Array) -> Array:
    """JAX's own, which mixes bfloat16 with its float32 softmax."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value)


def _tiled(length: int) -> int:
    """A number of tokens as it is padded."""
    return length + -length % _TILE


def _heads_first(x: Array) -> Array:
    """(B,T,N,H) -> (B,N,T',H), padded with zeros."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % _TILE), (0, 0)))


def _heads_last(x: Array, length: int) -> Array:
    """(B,N,T',H) -> (B,T,N,H)."""
    return x[:, :, :length].swapaxes(1, 2)


def _padded_attention(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """The attention, and its softmax (B,N,T',S'), which is 0 for padded keys."""
    length, keys = query.shape[1], key.shape[1]
    scale = query.shape[-1] ** -0.5
    query, key, value = map(_heads_first, (query, key, value))
    logits = jnp.einsum("bnth,bnsh->bnts", query, key, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(jnp.arange(key.shape[2]) < keys, logits, -jnp.inf)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return _heads_last(jnp.einsum("bnts,bnsh->bnth", weights, value), length), weights


def _padded_attention_gradient(query, key, value, result, weights, grad):
    """P the softmax: dV = P^T dO, dS = P (dO V^T - sum of dO O) scale, dQ = dS K, dK = dS^T Q."""
    scale, lengths = query.shape[-1] ** -0.5, [x.shape[1] for x in (query, key, value)]
    query, key, value, result, grad = map(_heads_first, (query, key, value, result, grad))
    by_value = jnp.einsum("bnts,bnth->bnsh", weights, grad)
    both = grad.astype(jnp.float32) * result.astype(jnp.float32)
    by_weights = jnp.einsum("bnth,bnsh->bnts", grad, value).astype(jnp.float32)
    by_logits = weights.astype(jnp.float32) * (by_weights - both.sum(-1, keepdims=True)) * scale
    by_logits = by_logits.astype(query.dtype)
    by_query = jnp.einsum("bnts,bnsh->bnth", by_logits, key)
    by_key = jnp.einsum("bnts,bnth->bnsh", by_logits, query)
    return tuple(map(_heads_last, (by_query, by_key, by_value), lengths))


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU; on GPUs by erf in float32, whose kernel XLA does not split in two."""
    return jax.lax.platform_dependent(x, cuda=_gelu_by_erf, rocm=_gelu_by_erf, default=_plain_gelu)


def _gelu_backward(x, grad):
    """The gradient of either form."""
    of = lambda form: lambda x, grad: jax.vjp(form, x)[1](grad)[0]
    by_erf = of(_gelu_by_erf)
    return (jax.lax.platform_dependent(x, grad, cuda=by_erf, rocm=by_erf, default=of(_plain_gelu)),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _plain_gelu(x: Array) -> Array:
    """JAX's own."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_by_erf(x: Array) -> Array:
    """x Phi(x)."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


@jax.custom_vjp
def relu(x: Array) -> Array:
    """max(x, 0), whose gradient on GPUs asks the result which entries were positive.

    The result is in memory anyway, as the input of the next layer, so that the input of the ReLU
    need not be. The barrier keeps XLA from turning the question back to the input.
    """
    return jax.nn.relu(x)


def _relu_forward(x):
    """The result, and what the gradient asks."""

    def of_result(x):
        y = jax.lax.optimization_barrier(jax.nn.relu(x))
        return y, y

    return jax.lax.platform_dependent(
        x, cuda=of_result, rocm=of_result, default=lambda x: (jax.nn.relu(x), x)
    )


def _relu_backward(kept, grad):
    """The gradient where the result is positive."""
    return (jnp.where(kept > 0, grad, jnp.zeros((), grad.dtype)),)


relu.defvjp(_relu_forward, _relu_backward)


def _convolution(stride: int, padding: Padding, x: Array, kernel: Array) -> Array:
    """The convolution as one, differentiated as JAX does."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_DIMENSIONS
    )


def _product(stride: int, padding: Padding, x: Array, kernel: Array) -> Array:
    """A convolution of 1x1 as a product."""
    return x[:, ::stride, ::stride] @ kernel[0, 0]


def _by_form(make: Callable[..., Any], *arguments: Array, kernel: Array, padding: Padding) -> Any:
    """What `make` makes of the form that suits kernel and platform: form -> function of arguments.

    On GPUs a convolution of 1x1 is one call of cuDNN with its bias, ReLU and residual; on CPUs and
    TPUs it is a product, which is faster there.
    """
    convolution = make(_convolution)
    if not _is_product(kernel, padding):
        return convolution(*arguments)
    return jax.lax.platform_dependent(
        *arguments, cuda=convolution, rocm=convolution, default=make(_product)
    )


def _is_product(kernel: Array, padding: Padding) -> bool:
    """Whether a convolution is a product of each pixel."""
    return kernel.shape[:2] == (1, 1) and tuple(padding) == ((0, 0), (0, 0))


def _plain_conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """The convolution, not to be differentiated."""
    make = lambda form: functools.partial(form, stride, padding)
    return _by_form(make, x, kernel, kernel=kernel, padding=padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolution_2d(
    x: Array, kernel: Array, stride: int, padding: Padding, shape: tuple[int, ...]
) -> Array:
    """The convolution of x, whose shape is `shape`.

    Its reverse mode is written out because on CPUs JAX's own gradient by x, inside a loop such as
    an attack's, misses XLA's fast kernels: a U-PGD step of a ResNet-20 took eight times longer.
    """
    return _plain_conv(x, kernel, stride, padding)


def _conv_forward(x, kernel, stride, padding, shape):
    """Keeps only what the gradients that are asked for need."""
    kept = (x.value if kernel.perturbed else None, kernel.value)
    return _plain_conv(x.value, kernel.value, stride, padding), (
        *kept,
        x.perturbed or None,
    )


def _conv_backward(stride, padding, shape, residuals, grad):
    """Gradients by x and by the kernel, where they are asked for."""
    x, kernel, wants_input = residuals
    by_x = by_kernel = None
    if isinstance(grad, SymbolicZero):
        return None, None
    if wants_input is not None:
        native = lambda form: functools.partial(_input_gradient, form, stride, padding, shape)
        if _is_product(kernel, padding):
            by_x = _product_gradient(native, stride, kernel, grad)
        else:
            by_x = jax.lax.platform_dependent(
                kernel,
                grad,
                cpu=functools.partial(_input_gradient_cpu, stride, padding, shape),
                default=native(_convolution),
            )
    if x is not None:
        native = lambda form: functools.partial(_kernel_gradient, form, stride, padding, kernel)
        by_kernel = _by_form(native, x, grad, kernel=kernel, padding=padding)
    return by_x, by_kernel


def _product_gradient(native, stride, kernel, grad):
    """That of a convolution of 1x1, which GPUs make as a convolution unless it has a stride.

    The zeros between the pixels of a stride then are never in memory, if the other gradient that
    they are added to, of a block's first and narrowing convolution, is not summed inside that one's
    call: for this the barrier.
    """
    if stride > 1:
        return native(_product)(kernel, grad)
    own = native(_convolution)
    if kernel.shape[2] > kernel.shape[3]:
        own = lambda *both: jax.lax.optimization_barrier(native(_convolution)(*both))
    return jax.lax.platform_dependent(kernel, grad, cuda=own, rocm=own, default=native(_product))


def _input_gradient(form, stride, padding, shape, kernel, grad):
    """As JAX has it."""
    x = jax.ShapeDtypeStruct(shape, grad.dtype)
    return jax.linear_transpose(lambda x: form(stride, padding, x, kernel), x)(grad)[0]


def _kernel_gradient(form, stride, padding, kernel, x, grad):
    """As JAX has it."""
    return jax.vjp(lambda k: form(stride, padding, x, k), kernel)[1](grad)[0]


def _input_gradient_cpu(stride, padding, shape, kernel, grad):
    """A convolution of the dilated gradient with the turned kernel, in the forward's layout."""
    size = kernel.shape[0]
    if stride > 1 and kernel.shape[2] * stride <= _NARROW:
        return _input_gradient_by_phases(stride, padding, shape, kernel, grad)
    # The barrier keeps XLA from moving the transposition back into the convolution's layout.
    turned = jax.lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    pads = [
        (size - 1 - low, size - 1 - high + (length + low + high - size) % stride)
        for length, (low, high) in zip(shape[1:3], padding, strict=True)
    ]
    return jax.lax.conv_general_dilated(
        grad, turned, (1, 1), pads, lhs_dilation=(stride, stride), dimension_numbers=_DIMENSIONS
    )


def _input_gradient_by_phases(stride, padding, shape, kernel, grad):
    """One dense convolution whose channels are the stride x stride phases of the pixels.

    With few input channels, as in a stem, it beats the dilated one, most of whose products are with
    zeros. Pixel i = stride q + r - low gets sum over m of grad[q - m] kernel[r + stride m].
    """
    size, _, channels, features = kernel.shape
    taps = -(-size // stride)
    grown = jnp.pad(kernel, ((0, taps * stride - size),) * 2 + ((0, 0), (0, 0)))
    grown = grown.reshape(taps, stride, taps, stride, channels, features)
    grown = grown.transpose(0, 2, 5, 1, 3, 4).reshape(taps, taps, features, -1)
    turned = jax.lax.optimization_barrier(jnp.flip(grown, (0, 1)))
    lengths = [-(-(n + low) // stride) for n, (low, _) in zip(shape[1:3], padding, strict=True)]
    pads = [(taps - 1, n - m) for n, m in zip(lengths, grad.shape[1:3], strict=True)]
    phases = jax.lax.conv_general_dilated(grad, turned, (1, 1), pads, dimension_numbers=_DIMENSIONS)
    phases = phases.reshape(shape[0], *lengths, stride, stride, channels).swapaxes(2, 3)
    pixels = phases.reshape(shape[0], *(n * stride for n in lengths), channels)
    (top, _), (left, _) = padding
    return pixels[:, top : top + shape[1], left : left + shape[2]]


convolution_2d.defvjp(_conv_forward, _conv_backward, symbolic_zeros=True)
