"""Devices and hosts: the mesh, how arrays lie on it, several processes, and what memory holds."""

from ur_jax.devices.mesh import (
    DATA_AXIS,
    check_divisible,
    data_mesh,
    pad_batch,
    replicate,
    shard,
)

__all__ = ["DATA_AXIS", "check_divisible", "data_mesh", "pad_batch", "replicate", "shard"]
