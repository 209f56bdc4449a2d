"""Reductions over axes; those of floating-point numbers are summed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ur_jax.encoders.bridge.ops.table import axes_of, dtype_of, row


def _dtype(self, dtype):
    """Of a sum: integers and masks are counted in integers."""
    if dtype is not None:
        return dtype_of(dtype)
    return self.dtype if jnp.issubdtype(self.dtype, jnp.floating) else jnp.int32


@row("aten::mean(Tensor self, *, ScalarType? dtype=None) -> Tensor",
     "aten::mean.dim(Tensor self, int[1]? dim, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor")  # fmt: skip
def mean(self, dim=None, keepdim=False, dtype=None):
    axes = axes_of(dim, self.ndim)
    return jnp.mean(self, axes, jnp.float32, keepdims=keepdim).astype(dtype_of(dtype, self.dtype))


@row("aten::sum(Tensor self, *, ScalarType? dtype=None) -> Tensor",
     "aten::sum.dim_IntList(Tensor self, int[1]? dim, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor")  # fmt: skip
def sum_(self, dim=None, keepdim=False, dtype=None):
    return jnp.sum(self, axes_of(dim, self.ndim), _dtype(self, dtype), keepdims=keepdim)


@row(
    "aten::prod.dim_int(Tensor self, int dim, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor"
)
def prod(self, dim, keepdim=False, dtype=None):
    return jnp.prod(self, dim, _dtype(self, dtype), keepdims=keepdim)


@row("aten::cumsum(Tensor self, int dim, *, ScalarType? dtype=None) -> Tensor")
def cumsum(self, dim, dtype=None):
    return jnp.cumsum(self, dim, _dtype(self, dtype))


@row("aten::amax(Tensor self, int[1] dim=[], bool keepdim=False) -> Tensor")
def amax(self, dim=(), keepdim=False):
    return jnp.max(self, axes_of(dim, self.ndim), keepdims=keepdim)


@row("aten::amin(Tensor self, int[1] dim=[], bool keepdim=False) -> Tensor")
def amin(self, dim=(), keepdim=False):
    return jnp.min(self, axes_of(dim, self.ndim), keepdims=keepdim)


@row("aten::max.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)")
def max_dim(self, dim, keepdim=False):
    return jnp.max(self, dim, keepdims=keepdim), jnp.argmax(self, dim, keepdims=keepdim)


@row("aten::min.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)")
def min_dim(self, dim, keepdim=False):
    return jnp.min(self, dim, keepdims=keepdim), jnp.argmin(self, dim, keepdims=keepdim)


@row("aten::argmax(Tensor self, int? dim=None, bool keepdim=False) -> Tensor")
def argmax(self, dim=None, keepdim=False):
    return jnp.argmax(self, dim, keepdims=keepdim)


@row("aten::argmin(Tensor self, int? dim=None, bool keepdim=False) -> Tensor")
def argmin(self, dim=None, keepdim=False):
    return jnp.argmin(self, dim, keepdims=keepdim)


@row("aten::any.dim(Tensor self, int dim, bool keepdim=False) -> Tensor",
     "aten::any.dims(Tensor self, int[]? dim=None, bool keepdim=False) -> Tensor",
     "aten::any(Tensor self) -> Tensor")  # fmt: skip
def any_(self, dim=None, keepdim=False):
    return jnp.any(self != 0, axes_of(dim, self.ndim), keepdims=keepdim)


@row("aten::var.correction(Tensor self, int[1]? dim=None, *, Scalar? correction=None, "
     "bool keepdim=False) -> Tensor")  # fmt: skip
def var(self, dim=None, correction=None, keepdim=False):
    ddof = 1 if correction is None else correction
    value = jnp.var(self, axes_of(dim, self.ndim), jnp.float32, ddof=ddof, keepdims=keepdim)
    return value.astype(self.dtype)


@row("aten::var_mean.correction(Tensor self, int[1]? dim=None, *, Scalar? correction=None, "
     "bool keepdim=False) -> (Tensor, Tensor)")  # fmt: skip
def var_mean(self, dim=None, correction=None, keepdim=False):
    return var(self, dim, correction, keepdim), mean(self, dim, keepdim)


@row("aten::std.correction(Tensor self, int[1]? dim=None, *, Scalar? correction=None, "
     "bool keepdim=False) -> Tensor")  # fmt: skip
def std(self, dim=None, correction=None, keepdim=False):
    return jnp.sqrt(var(self, dim, correction, keepdim))


@row("aten::linalg_vector_norm(Tensor self, Scalar ord=2, int[1]? dim=None, bool keepdim=False, *, "
     "ScalarType? dtype=None) -> Tensor")  # fmt: skip
def linalg_vector_norm(self, ord=2, dim=None, keepdim=False, dtype=None):
    """In float32; at zero the gradient is zero, as PyTorch's."""
    axes, x = axes_of(dim, self.ndim), self.astype(jnp.float32)
    if ord == 2:
        squares = jnp.sum(x * x, axes, keepdims=keepdim)
        value = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    elif ord == float("inf"):
        value = jnp.max(jnp.abs(x), axes, keepdims=keepdim)
    else:
        value = jnp.sum(jnp.abs(x) ** ord, axes, keepdims=keepdim) ** (1.0 / ord)
    return value.astype(dtype_of(dtype, self.dtype))


@row("aten::_softmax(Tensor self, int dim, bool half_to_float) -> Tensor")
def softmax(self, dim, half_to_float=False):
    return jax.nn.softmax(self.astype(jnp.float32), dim).astype(self.dtype)


@row("aten::_log_softmax(Tensor self, int dim, bool half_to_float) -> Tensor")
def log_softmax(self, dim, half_to_float=False):
    return jax.nn.log_softmax(self.astype(jnp.float32), dim).astype(self.dtype)


@row("aten::softmax.int(Tensor self, int dim, ScalarType? dtype=None) -> Tensor")
def softmax_int(self, dim, dtype=None):
    value = jax.nn.softmax(self.astype(jnp.float32), dim)
    return value.astype(dtype_of(dtype, self.dtype))


@row("aten::topk(Tensor self, SymInt k, int dim=-1, bool largest=True, bool sorted=True) -> "
     "(Tensor values, Tensor indices)")  # fmt: skip
def topk(self, k, dim=-1, largest=True, sorted=True):
    moved = jnp.moveaxis(self, dim, -1)
    values, indices = jax.lax.top_k(moved if largest else -moved, k)
    back = lambda x: jnp.moveaxis(x, -1, dim)
    return back(values if largest else -values), back(indices)


@row(
    "aten::sort(Tensor self, int dim=-1, bool descending=False) -> (Tensor values, Tensor indices)"
)
def sort(self, dim=-1, descending=False):
    indices = jnp.argsort(self, dim, descending=descending)
    return jnp.take_along_axis(self, indices, dim), indices
