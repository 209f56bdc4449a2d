"""The devices: the mesh, how arrays lie on it, and batches padded to a static size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ur_jax.errors import UserError
from ur_jax.types import PyTree

DATA_AXIS = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a one-dimensional mesh whose only axis, "data", divides batches.

    Args:
      devices: the devices to use; all local devices by default.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (AxisType.Auto,), devices=devices)


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless `batch_size` divides evenly over the devices of `mesh`."""
    num_devices = mesh.size
    if batch_size < 1 or batch_size % num_devices:
        lower = max(batch_size // num_devices, 1) * num_devices
        raise UserError(
            f"Expected batch_size divisible by {num_devices} devices, got {batch_size}; "
            f"use {lower} or {lower + num_devices}."
        )


def shard(mesh: Mesh, tree: PyTree) -> PyTree:
    """Places every array of `tree` with its leading axis divided over the devices.

    Args:
      mesh: a mesh made by `data_mesh`.
      tree: arrays whose leading axis is the batch; on a mesh over several processes, this
        process's share of it, equal in all of them.

    Raises:
      ValueError: if a leading axis does not divide by the number of devices.
    """
    num_processes = len({device.process_index for device in mesh.devices.flat})
    for leaf in jax.tree.leaves(tree):
        check_divisible(leaf.shape[0] * num_processes, mesh)
    divided = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    if num_processes > 1:
        place = lambda leaf: jax.make_array_from_process_local_data(divided, np.asarray(leaf))
        return jax.tree.map(place, tree)
    return jax.device_put(tree, divided)


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """Places a copy of every array of `tree` on each device of `mesh`."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def pad_batch(tree: PyTree, size: int) -> tuple[PyTree, np.ndarray]:
    """Pads the leading axis to `size` by repeating the last row, so that shapes stay static.

    Args:
      tree: host or device arrays with the same leading axis n, 1 <= n <= size.
      size: the leading axis wanted.

    Returns:
      The padded tree, and a bool mask [size] that is True on the n given rows.
    """
    n = jax.tree.leaves(tree)[0].shape[0]
    assert 1 <= n <= size, (n, size)

    def pad(leaf):
        xp = np if isinstance(leaf, np.ndarray) else jnp
        return leaf if n == size else xp.concatenate([leaf, xp.repeat(leaf[-1:], size - n, axis=0)])

    return jax.tree.map(pad, tree), np.arange(size) < n
