"""Passes: each turns a graph into an equal one that is faster.

A pass is a function of (graph, tensors) that returns both anew. Each is held to the result without
it by `tests/encoders/bridge/test_passes.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from ur_jax.encoders.bridge.graph import Graph, Tensors
from ur_jax.encoders.bridge.passes.attention import attention
from ur_jax.encoders.bridge.passes.channels import channels_last
from ur_jax.encoders.bridge.passes.folding import fold_batch_norm, open_batch_norm
from ur_jax.encoders.bridge.passes.patterns import recognised
from ur_jax.encoders.bridge.passes.simplify import simplified

Pass = Callable[[Graph, Tensors], tuple[Graph, Tensors]]

PASSES: tuple[Pass, ...] = (
    simplified,
    recognised,
    fold_batch_norm,
    attention,
    channels_last,
    simplified,
)
"""In this order."""


def trainable(graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """The graph after the passes that leave all tensors as they are."""
    for step in (simplified, recognised, open_batch_norm, attention):
        graph, tensors = step(graph, tensors)
    return simplified(*channels_last(graph, tensors, tensors))


def optimised(graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """The graph after all passes."""
    for step in PASSES:
        graph, tensors = step(graph, tensors)
    return graph, tensors
