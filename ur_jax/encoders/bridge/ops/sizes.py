"""Sizes: integers that depend on the batch, and what of several results is meant."""

from __future__ import annotations

import jax.numpy as jnp

from ur_jax.encoders.bridge.ops.table import row


@row("aten::sym_size.int(Tensor self, int dim) -> SymInt")
def size(self, dim):
    return jnp.shape(self)[dim]


@row("aten::sym_numel(Tensor self) -> SymInt")
def numel(self):
    return jnp.size(self)


@row("ur::size_add(SymInt a, SymInt b) -> SymInt")
def size_add(a, b):
    return a + b


@row("ur::size_sub(SymInt a, SymInt b) -> SymInt")
def size_sub(a, b):
    return a - b


@row("ur::size_mul(SymInt a, SymInt b) -> SymInt")
def size_mul(a, b):
    return a * b


@row("ur::size_floordiv(SymInt a, SymInt b) -> SymInt")
def size_floordiv(a, b):
    return a // b


@row("ur::size_mod(SymInt a, SymInt b) -> SymInt")
def size_mod(a, b):
    return a % b


@row("ur::size_neg(SymInt a) -> SymInt")
def size_neg(a):
    return -a


@row("ur::getitem(Tensor[] items, int index) -> Tensor")
def getitem(items, index):
    return items[index]
