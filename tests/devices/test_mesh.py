"""Batches over devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ur_jax import devices


def test_shard_divides_and_replicate_copies():
    mesh = devices.data_mesh()
    assert mesh.size == len(jax.local_devices()) == 8
    rows = np.arange(16.0).reshape(16, 1)
    sharded, copied = devices.shard(mesh, rows), devices.replicate(mesh, rows)
    assert {shard.data.shape for shard in sharded.addressable_shards} == {(2, 1)}
    assert {shard.data.shape for shard in copied.addressable_shards} == {(16, 1)}
    np.testing.assert_array_equal(sharded, rows)


def test_pad_batch_repeats_the_last_row():
    padded, mask = devices.pad_batch({"x": np.arange(3), "y": np.ones((3, 2))}, 5)
    np.testing.assert_array_equal(padded["x"], [0, 1, 2, 2, 2])
    assert padded["y"].shape == (5, 2)
    np.testing.assert_array_equal(mask, [True, True, True, False, False])


def test_indivisible_batch_names_what_would_do():
    mesh = devices.data_mesh()
    with pytest.raises(ValueError, match="divisible by 8 devices, got 100; use 96 or 104"):
        devices.shard(mesh, np.zeros((100, 2)))
    with pytest.raises(ValueError, match="got 5; use 8 or 16"):
        devices.check_divisible(5, mesh)
