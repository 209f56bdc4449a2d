"""Shapes: views, permutations, slices, joining, indexing, padding, and arrays of one value."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ur_jax.encoders.bridge.ops.table import LARGEST, dtype_of, row, sized

_MADE = "ScalarType? dtype=None, Layout? layout=None, Device? device=None, bool? pin_memory=None"
_LIKE = f"{_MADE}, MemoryFormat? memory_format=None"


@row("aten::view(Tensor(a) self, SymInt[] size) -> Tensor(a)",
     "aten::_unsafe_view(Tensor self, SymInt[] size) -> Tensor")  # fmt: skip
def view(self, size):
    return jnp.reshape(self, size)


@row("aten::reshape(Tensor(a) self, SymInt[] shape) -> Tensor(a)")
def reshape(self, shape):
    return jnp.reshape(self, shape)


@row("aten::clone(Tensor self, *, MemoryFormat? memory_format=None) -> Tensor",
     "aten::alias(Tensor(a) self) -> Tensor(a)",
     "aten::detach(Tensor(a) self) -> Tensor(a)",
     "aten::lift_fresh_copy(Tensor self) -> Tensor")  # fmt: skip
def clone(self):
    return self


@row(
    "aten::contiguous(Tensor(a) self, *, MemoryFormat memory_format=contiguous_format) -> Tensor(a)"
)
def contiguous(self):
    return self


@row("aten::copy(Tensor self, Tensor src, bool non_blocking=False) -> Tensor")
def copy(self, src):
    return jnp.broadcast_to(src, self.shape).astype(self.dtype)


@row("aten::permute(Tensor(a) self, int[] dims) -> Tensor(a)")
def permute(self, dims):
    return jnp.transpose(self, dims)


@row("aten::transpose.int(Tensor(a) self, int dim0, int dim1) -> Tensor(a)")
def transpose(self, dim0, dim1):
    return jnp.swapaxes(self, dim0, dim1)


@row("aten::t(Tensor(a) self) -> Tensor(a)")
def t(self):
    return jnp.transpose(self)


@row("aten::expand(Tensor(a) self, SymInt[] size, *, bool implicit=False) -> Tensor(a)")
def expand(self, size, implicit=False):
    have = (1,) * (len(size) - jnp.ndim(self)) + jnp.shape(self)
    return jnp.broadcast_to(self, sized(*(h if n == -1 else n for h, n in zip(have, size))))


@row("aten::unsqueeze(Tensor(a) self, int dim) -> Tensor(a)")
def unsqueeze(self, dim):
    return jnp.expand_dims(self, dim)


@row("aten::squeeze.dim(Tensor(a) self, int dim) -> Tensor(a)",
     "aten::squeeze.dims(Tensor(a) self, int[] dim) -> Tensor(a)")  # fmt: skip
def squeeze(self, dim):
    dims = dim if isinstance(dim, (list, tuple)) else (dim,)
    return jnp.squeeze(self, tuple(d for d in dims if self.shape[d] == 1))


@row("aten::select.int(Tensor(a) self, int dim, SymInt index) -> Tensor(a)")
def select(self, dim, index):
    return jax.lax.index_in_dim(self, index, dim, keepdims=False)


@row("aten::slice.Tensor(Tensor(a) self, int dim=0, SymInt? start=None, SymInt? end=None, "
     "SymInt step=1) -> Tensor(a)")  # fmt: skip
def slice_(self, dim=0, start=None, end=None, step=1):
    start, end, step = slice(start, end, step).indices(self.shape[dim])
    return jax.lax.slice_in_dim(self, start, max(start, end), step, dim)


@row("aten::slice_scatter(Tensor self, Tensor src, int dim=0, SymInt? start=None, SymInt? end=None, "
     "SymInt step=1) -> Tensor")  # fmt: skip
def slice_scatter(self, src, dim=0, start=None, end=None, step=1):
    where = [slice(None)] * self.ndim
    where[dim] = slice(start, None if end is None or end >= self.shape[dim] else end, step)
    return self.at[tuple(where)].set(src)


@row("aten::select_scatter(Tensor self, Tensor src, int dim, SymInt index) -> Tensor")
def select_scatter(self, src, dim, index):
    where = [slice(None)] * self.ndim
    where[dim] = index
    return self.at[tuple(where)].set(src)


@row("aten::cat(Tensor[] tensors, int dim=0) -> Tensor")
def cat(tensors, dim=0):
    kept = [x for x in tensors if jnp.shape(x) != (0,)]  # PyTorch's old empty tensor
    return jnp.concatenate(kept, dim)


@row("aten::stack(Tensor[] tensors, int dim=0) -> Tensor")
def stack(tensors, dim=0):
    return jnp.stack(tensors, dim)


@row("aten::split_with_sizes(Tensor(a -> *) self, SymInt[] split_sizes, int dim=0) -> Tensor(a)[]")
def split_with_sizes(self, split_sizes, dim=0):
    ends = [sum(split_sizes[: i + 1]) for i in range(len(split_sizes))]
    return [jax.lax.slice_in_dim(self, e - n, e, 1, dim) for e, n in zip(ends, split_sizes)]


@row("aten::split.Tensor(Tensor(a -> *) self, SymInt split_size, int dim=0) -> Tensor(a)[]")
def split(self, split_size, dim=0):
    length = self.shape[dim]
    starts = range(0, max(length, 1), max(split_size, 1))
    return [jax.lax.slice_in_dim(self, s, min(s + split_size, length), 1, dim) for s in starts]


@row("aten::chunk(Tensor(a -> *) self, int chunks, int dim=0) -> Tensor(a)[]")
def chunk(self, chunks, dim=0):
    return split(self, -(-self.shape[dim] // chunks), dim)


@row("aten::unbind.int(Tensor(a -> *) self, int dim=0) -> Tensor(a)[]")
def unbind(self, dim=0):
    return [select(self, dim, i) for i in range(self.shape[dim])]


@row("aten::unfold(Tensor(a) self, int dimension, int size, int step) -> Tensor(a)")
def unfold(self, dimension, size, step):
    """Windows along an axis, each in a new last axis."""
    axis = dimension % self.ndim
    count = (self.shape[axis] - size) // step + 1
    at = [
        jax.lax.slice_in_dim(self, i, i + (count - 1) * step + 1, step, axis) for i in range(size)
    ]
    return jnp.stack(at, -1)


@row("aten::repeat(Tensor self, SymInt[] repeats) -> Tensor")
def repeat(self, repeats):
    sized(jnp.size(self), *repeats)
    return jnp.tile(self, repeats)


@row("aten::flip(Tensor self, int[] dims) -> Tensor")
def flip(self, dims):
    return jnp.flip(self, tuple(dims))


@row("aten::roll(Tensor self, SymInt[1] shifts, int[1] dims=[]) -> Tensor")
def roll(self, shifts, dims=()):
    return jnp.roll(self, tuple(shifts), tuple(dims)) if dims else jnp.roll(self, shifts[0])


@row("aten::index_select(Tensor self, int dim, Tensor index) -> Tensor")
def index_select(self, dim, index):
    return jnp.take(self, jnp.atleast_1d(index), axis=dim, mode="wrap")


@row("aten::index.Tensor(Tensor self, Tensor?[] indices) -> Tensor",
     "aten::_unsafe_index.Tensor(Tensor self, Tensor?[] indices) -> Tensor")  # fmt: skip
def index(self, indices):
    """As PyTorch and NumPy have it; a mask is refused, whose result depends on data."""
    if any(x is not None and jnp.issubdtype(jnp.result_type(x), jnp.bool_) for x in indices):
        raise TypeError("a mask as an index gives a shape that depends on data")
    return self[tuple(slice(None) if x is None else x for x in indices)]


@row(
    "aten::index_put(Tensor self, Tensor?[] indices, Tensor values, bool accumulate=False) -> Tensor"
)
def index_put(self, indices, values, accumulate=False):
    at = self.at[tuple(slice(None) if x is None else x for x in indices)]
    values = jnp.asarray(values, self.dtype)
    return at.add(values) if accumulate else at.set(values)


@row("aten::gather(Tensor self, int dim, Tensor index, *, bool sparse_grad=False) -> Tensor")
def gather(self, dim, index, sparse_grad=False):
    kept = tuple(slice(0, n) for n in index.shape)
    kept = tuple(slice(None) if d == dim % self.ndim else k for d, k in enumerate(kept))
    return jnp.take_along_axis(self[kept], index, axis=dim)


@row("aten::scatter.src(Tensor self, int dim, Tensor index, Tensor src) -> Tensor")
def scatter(self, dim, index, src):
    src = src[tuple(slice(0, n) for n in index.shape)]
    where = list(jnp.indices(index.shape, sparse=True))
    where[dim % self.ndim] = index
    return self.at[tuple(where)].set(src)


@row("aten::scatter.value(Tensor self, int dim, Tensor index, Scalar value) -> Tensor")
def scatter_value(self, dim, index, value):
    return scatter(self, dim, index, jnp.full(index.shape, value, self.dtype))


@row("aten::constant_pad_nd(Tensor self, SymInt[] pad, Scalar value=0) -> Tensor")
def constant_pad_nd(self, pad, value=0):
    widths = _widths(pad, self.ndim)
    sized(*(n + low + high for n, (low, high) in zip(self.shape, widths)))
    return jax.lax.pad(self, jnp.asarray(value, self.dtype), [(*w, 0) for w in widths])


@row("aten::reflection_pad2d(Tensor self, SymInt[4] padding) -> Tensor",
     "aten::reflection_pad1d(Tensor self, SymInt[2] padding) -> Tensor")  # fmt: skip
def reflection_pad(self, padding):
    return jnp.pad(self, _widths(padding, self.ndim), mode="reflect")


@row("aten::replication_pad2d(Tensor self, SymInt[4] padding) -> Tensor")
def replication_pad(self, padding):
    return jnp.pad(self, _widths(padding, self.ndim), mode="edge")


def _widths(pad, rank):
    """PyTorch's paddings, last axis first, as (low, high) of every axis."""
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    return [(0, 0)] * (rank - len(pairs)) + pairs[::-1]


@row("aten::pixel_shuffle(Tensor self, int upscale_factor) -> Tensor")
def pixel_shuffle(self, upscale_factor):
    *front, channels, height, width = self.shape
    r = upscale_factor
    x = jnp.reshape(self, (*front, channels // r**2, r, r, height, width))
    n = len(front)
    x = jnp.transpose(x, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return jnp.reshape(x, (*front, channels // r**2, height * r, width * r))


@row("aten::pixel_unshuffle(Tensor self, int downscale_factor) -> Tensor")
def pixel_unshuffle(self, downscale_factor):
    *front, channels, height, width = self.shape
    r, n = downscale_factor, len(front)
    x = jnp.reshape(self, (*front, channels, height // r, r, width // r, r))
    x = jnp.transpose(x, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return jnp.reshape(x, (*front, channels * r**2, height // r, width // r))


@row(f"aten::full(SymInt[] size, Scalar fill_value, *, {_MADE}) -> Tensor")
def full(size, fill_value, dtype=None):
    otherwise = jnp.asarray(fill_value).dtype
    return jnp.full(sized(*size), fill_value, dtype_of(dtype, otherwise))


@row(f"aten::full_like(Tensor self, Scalar fill_value, *, {_LIKE}) -> Tensor")
def full_like(self, fill_value, dtype=None):
    return jnp.full(jnp.shape(self), fill_value, dtype_of(dtype, jnp.result_type(self)))


@row(f"aten::zeros(SymInt[] size, *, {_MADE}) -> Tensor")
def zeros(size, dtype=None):
    return jnp.zeros(sized(*size), dtype_of(dtype))


@row(f"aten::ones(SymInt[] size, *, {_MADE}) -> Tensor")
def ones(size, dtype=None):
    return jnp.ones(sized(*size), dtype_of(dtype))


@row(f"aten::zeros_like(Tensor self, *, {_LIKE}) -> Tensor")
def zeros_like(self, dtype=None):
    return full_like(self, 0, dtype)


@row(f"aten::ones_like(Tensor self, *, {_LIKE}) -> Tensor")
def ones_like(self, dtype=None):
    return full_like(self, 1, dtype)


@row("aten::new_zeros(Tensor self, SymInt[] size, *, " + _MADE + ") -> Tensor")
def new_zeros(self, size, dtype=None):
    return jnp.zeros(sized(*size), dtype_of(dtype, self.dtype))


@row("aten::new_ones(Tensor self, SymInt[] size, *, " + _MADE + ") -> Tensor")
def new_ones(self, size, dtype=None):
    return jnp.ones(sized(*size), dtype_of(dtype, self.dtype))


@row(f"aten::arange.start_step(Scalar start, Scalar end, Scalar step=1, *, {_MADE}) -> Tensor")
def arange(start, end, step=1, dtype=None):
    whole = all(isinstance(x, int) for x in (start, end, step))
    count = math.ceil((end - start) / step) if step else LARGEST + 1
    sized(max(count, 0))
    values = jnp.arange(max(count, 0)) * step + start
    return values.astype(dtype_of(dtype, jnp.int32 if whole else jnp.float32))


@row(f"aten::scalar_tensor(Scalar s, *, {_MADE}) -> Tensor")
def scalar_tensor(s, dtype=None):
    return jnp.asarray(s, dtype_of(dtype))


@row("aten::tril(Tensor self, SymInt diagonal=0) -> Tensor")
def tril(self, diagonal=0):
    return jnp.tril(self, diagonal)


@row("aten::triu(Tensor self, SymInt diagonal=0) -> Tensor")
def triu(self, diagonal=0):
    return jnp.triu(self, diagonal)
