"""What the methods with a momentum encoder share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ur_jax.checks import check_number, check_whole
from ur_jax.training.methods.base import check_dtype
from ur_jax.types import PyTree


def in_training(method, network, variables, images):
    """Outputs of a network on [0,1] images in training mode, and its moved statistics."""
    mean, std = jnp.asarray(method.mean), jnp.asarray(method.std)
    images = ((images - mean) / std).astype(method.dtype)
    variables = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    outputs, updated = network.apply(variables, images, train=True, mutable="batch_stats")
    return outputs, updated.get("batch_stats", {})


def blend(old: PyTree, new: PyTree, momentum: ArrayLike) -> PyTree:
    """momentum * old + (1 - momentum) * new."""
    return jax.tree.map(lambda k, q: momentum * k + (1.0 - momentum) * q, old, new)


def check_settings(method: Any) -> None:
    """Raises UserError for settings out of range."""
    check_number(method, "temperature", above=0.0)
    if method.group_size is not None:
        check_whole(method, "group_size")
    check_dtype(method.dtype)
