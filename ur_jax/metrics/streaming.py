"""How a bank of any size passes through the devices, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ur_jax import distances as dist
from ur_jax.devices import DATA_AXIS, pad_batch, replicate, shard
from ur_jax.errors import UserError
from ur_jax.types import AnyArray, Array


def stream(
    update: Callable[..., Any],
    state: Any,
    bank: AnyArray,
    block_size: int,
    mesh: Mesh | None,
) -> Any:
    """Folds `update(state, rows, indices, mask)` over equal blocks, one alive at a time."""
    if block_size < 1:
        raise UserError(f"Expected block_size >= 1, got {block_size}.")
    n, devices = bank.shape[0], 1 if mesh is None else mesh.size
    size = -(-min(block_size, n) // devices) * devices
    for start in range(0, n, size):
        rows = bank[start : start + size]
        # A memory map is read here, while the devices still work on the block before.
        rows = rows if isinstance(rows, jax.Array) else np.ascontiguousarray(rows)
        indices = np.arange(start, start + rows.shape[0], dtype=np.int32)
        (rows, indices), mask = pad_batch((rows, indices), size)
        jax.block_until_ready(state)
        block = (rows, indices, mask)
        state = update(state, *(jax.device_put(block) if mesh is None else shard(mesh, block)))
    return state


def place(mesh: Mesh | None, replicated: Any, divided: Any) -> tuple[Any, Any]:
    """Puts the queries on every device and the running results each on their own."""
    if mesh is None:
        return jax.device_put((replicated, divided))
    return replicate(mesh, replicated), shard(mesh, divided)


def on_mesh(fn: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`fn(state, queries, *block)` on each device's share of state and block, queries whole."""
    if mesh is None:
        return fn
    divided, whole = PartitionSpec(DATA_AXIS), PartitionSpec()
    specs = (divided, whole, divided, divided, divided)
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=divided)


def check_same_dimension(queries: AnyArray, bank: AnyArray) -> None:
    """Raises ValueError unless the bank is [N, D] with the D of the queries."""
    if bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise UserError(
            f"Expected a bank of shape [N, {queries.shape[1]}] to match the queries, got "
            f"{bank.shape}; are they from the same encoder and representation?"
        )


def rough_distances(queries: Array, rows: Array, divergence: str) -> tuple[Array, Array]:
    """What orders the rows by distance to each query [Q, B], and an estimate of its rounding."""
    if divergence in ("l2", "cosine"):
        return dist.squared_l2_by_product(queries, rows)
    distances = dist.pairwise_distances(queries, rows, divergence=divergence)
    return distances, dist.relative_rounding(rows.shape[1]) * distances
