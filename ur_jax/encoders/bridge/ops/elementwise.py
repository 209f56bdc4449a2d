"""Element by element: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ur_jax.encoders.bridge.ops.table import dtype_of, row
from ur_jax.encoders.networks import forms


def _unary(name, function):
    """A row of one tensor."""
    row(f"aten::{name}(Tensor self) -> Tensor")(lambda self: function(self))


def _binary(name, function, scalars=True):
    """Rows of two tensors, and of a tensor and a number."""
    row(f"aten::{name}.Tensor(Tensor self, Tensor other) -> Tensor")(
        lambda self, other: function(self, other)
    )
    if scalars:
        row(f"aten::{name}.Scalar(Tensor self, Scalar other) -> Tensor")(
            lambda self, other: function(self, other)
        )


def _pair(name, function):
    """A row of two tensors that has no other."""
    row(f"aten::{name}(Tensor self, Tensor other) -> Tensor")(
        lambda self, other: function(self, other)
    )


for _name, _function in {
    "abs": jnp.abs,
    "bitwise_not": jnp.bitwise_not,
    "ceil": jnp.ceil,
    "cos": jnp.cos,
    "erf": lambda x: jax.lax.erf(_floating(x)),
    "exp": jnp.exp,
    "expm1": jnp.expm1,
    "floor": jnp.floor,
    "hardsigmoid": lambda x: jnp.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "hardswish": lambda x: x * jnp.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "isnan": jnp.isnan,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "logical_not": jnp.logical_not,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "neg": jnp.negative,
    "reciprocal": lambda x: 1.0 / x,
    "relu": forms.relu,
    "relu6": lambda x: jnp.clip(x, 0, 6),
    "round": jnp.round,
    "rsqrt": lambda x: jax.lax.rsqrt(_floating(x)),
    "sigmoid": jax.nn.sigmoid,
    "sign": jnp.sign,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "sqrt": jnp.sqrt,
    "square": jnp.square,
    "tan": jnp.tan,
    "tanh": jnp.tanh,
    "trunc": jnp.trunc,
}.items():
    _unary(_name, _function)

for _name, _function in {
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "eq": jnp.equal,
    "fmod": jnp.fmod,
    "ge": jnp.greater_equal,
    "gt": jnp.greater,
    "le": jnp.less_equal,
    "lt": jnp.less,
    "ne": jnp.not_equal,
    "remainder": jnp.remainder,
}.items():
    _binary(_name, _function)

for _name, _function in {
    "atan2": jnp.arctan2,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
}.items():
    _pair(_name, _function)


def _floating(x):
    """Integers become float32, as PyTorch has it."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


@row("aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor",
     "aten::add.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor")  # fmt: skip
def add(self, other, alpha=1):
    return self + other if alpha == 1 else self + other * alpha


@row("aten::sub.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor",
     "aten::sub.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor")  # fmt: skip
def sub(self, other, alpha=1):
    return self - other if alpha == 1 else self - other * alpha


@row("aten::rsub.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor")
def rsub(self, other, alpha=1):
    return other - self * alpha


@row("aten::mul.Tensor(Tensor self, Tensor other) -> Tensor",
     "aten::mul.Scalar(Tensor self, Scalar other) -> Tensor")  # fmt: skip
def mul(self, other):
    return self * other


@row("aten::div.Tensor(Tensor self, Tensor other) -> Tensor",
     "aten::div.Scalar(Tensor self, Scalar other) -> Tensor")  # fmt: skip
def div(self, other):
    return self / other


@row("aten::div.Tensor_mode(Tensor self, Tensor other, *, str? rounding_mode) -> Tensor",
     "aten::div.Scalar_mode(Tensor self, Scalar other, *, str? rounding_mode) -> Tensor")  # fmt: skip
def div_mode(self, other, rounding_mode):
    if rounding_mode is None:
        return self / other
    if rounding_mode == "floor":
        return jnp.floor_divide(self, other)
    return jnp.trunc(self / other).astype(jnp.result_type(self, other))


@row("aten::floor_divide(Tensor self, Tensor other) -> Tensor")
def floor_divide(self, other):
    return jnp.floor_divide(self, other)


@row("aten::pow.Tensor_Scalar(Tensor self, Scalar exponent) -> Tensor",
     "aten::pow.Tensor_Tensor(Tensor self, Tensor exponent) -> Tensor",
     "aten::pow.Scalar(Scalar self, Tensor exponent) -> Tensor")  # fmt: skip
def power(self, exponent):
    # A whole number as an integer: its gradient at 0 is no NaN, and there is no logarithm.
    is_whole = isinstance(exponent, float) and exponent.is_integer() and abs(exponent) < 8
    return self ** (int(exponent) if is_whole else exponent)


@row("aten::where.self(Tensor condition, Tensor self, Tensor other) -> Tensor")
def where(condition, self, other):
    return jnp.where(condition, self, other)


@row("aten::masked_fill.Scalar(Tensor self, Tensor mask, Scalar value) -> Tensor",
     "aten::masked_fill.Tensor(Tensor self, Tensor mask, Tensor value) -> Tensor")  # fmt: skip
def masked_fill(self, mask, value):
    return jnp.where(mask, jnp.asarray(value, self.dtype), self)


@row("aten::clamp(Tensor self, Scalar? min=None, Scalar? max=None) -> Tensor",
     "aten::clamp.Tensor(Tensor self, Tensor? min=None, Tensor? max=None) -> Tensor")  # fmt: skip
def clamp(self, min=None, max=None):
    return jnp.clip(self, min, max)


@row("aten::hardtanh(Tensor self, Scalar min_val=-1, Scalar max_val=1) -> Tensor")
def hardtanh(self, min_val=-1, max_val=1):
    return jnp.clip(self, min_val, max_val)


@row("aten::clamp_min(Tensor self, Scalar min) -> Tensor",
     "aten::clamp_min.Tensor(Tensor self, Tensor min) -> Tensor")  # fmt: skip
def clamp_min(self, min):
    return jnp.maximum(self, min)


@row("aten::clamp_max(Tensor self, Scalar max) -> Tensor",
     "aten::clamp_max.Tensor(Tensor self, Tensor max) -> Tensor")  # fmt: skip
def clamp_max(self, max):
    return jnp.minimum(self, max)


@row('aten::gelu(Tensor self, *, str approximate="none") -> Tensor')
def gelu(self, approximate="none"):
    return jax.nn.gelu(self, approximate=True) if approximate == "tanh" else forms.gelu(self)


@row("aten::elu(Tensor self, Scalar alpha=1, Scalar scale=1, Scalar input_scale=1) -> Tensor")
def elu(self, alpha=1, scale=1, input_scale=1):
    below = alpha * jnp.expm1(jnp.minimum(self, 0) * input_scale)
    return scale * jnp.where(self > 0, self, below)


@row("aten::leaky_relu(Tensor self, Scalar negative_slope=0.01) -> Tensor")
def leaky_relu(self, negative_slope=0.01):
    return jnp.where(self > 0, self, self * negative_slope)


@row("aten::softplus(Tensor self, Scalar beta=1, Scalar threshold=20) -> Tensor")
def softplus(self, beta=1, threshold=20):
    scaled = self * beta
    return jnp.where(scaled > threshold, self, jax.nn.softplus(scaled) / beta)


@row("aten::_to_copy(Tensor self, *, ScalarType? dtype=None, Layout? layout=None, Device? device=None, "
     "bool? pin_memory=None, bool non_blocking=False, MemoryFormat? memory_format=None) -> Tensor",
     "aten::to.dtype(Tensor(a) self, ScalarType dtype, bool non_blocking=False, bool copy=False, "
     "MemoryFormat? memory_format=None) -> Tensor(a)",
     "aten::to.dtype_layout(Tensor(a) self, *, ScalarType? dtype=None, Layout? layout=None, "
     "Device? device=None, bool? pin_memory=None, bool non_blocking=False, bool copy=False, "
     "MemoryFormat? memory_format=None) -> Tensor(a)")  # fmt: skip
def to(self, dtype=None, copy=False):
    return self if dtype is None else jnp.asarray(self).astype(dtype_of(dtype))


@row("aten::type_as(Tensor self, Tensor other) -> Tensor")
def type_as(self, other):
    return self.astype(jnp.result_type(other))


@row("ur::batch_norm(Tensor self, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
     "int axis) -> Tensor")  # fmt: skip
def batch_norm(self, mean, var, eps, axis, weight=None, bias=None):
    """A BatchNorm with running statistics along an axis, whose tensors stay what they are."""
    scale = jax.lax.rsqrt(var.astype(jnp.float32) + eps)
    if weight is not None:
        scale = scale * weight.astype(jnp.float32)
    shift = -mean.astype(jnp.float32) * scale
    if bias is not None:
        shift = shift + bias.astype(jnp.float32)
    return affine(self, scale, shift, axis)


@row("ur::affine(Tensor self, Tensor scale, Tensor shift, int axis) -> Tensor")
def affine(self, scale, shift, axis):
    """self * scale + shift along an axis, in float32: what is left of a BatchNorm."""
    shape = [1] * self.ndim
    shape[axis] = -1
    scale, shift = (x.astype(jnp.float32).reshape(shape) for x in (scale, shift))
    return (self.astype(jnp.float32) * scale + shift).astype(self.dtype)
