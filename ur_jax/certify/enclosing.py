"""Centers: the sample whose ball holds half of all samples within the smallest radius."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from scipy import stats

from ur_jax.devices import DATA_AXIS
from ur_jax.distances import distance, pairwise_distances
from ur_jax.encoders.base import Encoder
from ur_jax.types import Array

# Rows whose distances are in memory at once, at most, and what they are a multiple of. A count per
# bit is a kernel: on a GPU, 128 rows are so few that starting it is most of its time.
_ROW_BLOCK = {"cpu": 128}
_DEFAULT_ROW_BLOCK, _ROWS = 1024, 128


class Center(NamedTuple):
    """A center and what is measured from it; device arrays.

    Attributes:
      center: [D], one of the samples.
      radius: distance within which half of the samples lie.
      smoothing_error: distance of the center from the representation of the clean image.
      estimate: distance of the sample of the given rank.
      num_bad: samples that are not finite.
    """

    center: Array
    radius: Array
    smoothing_error: Array
    estimate: Array
    num_bad: Array


@functools.cache
def smallest_n0(delta: float, alpha: float) -> int:
    """Smallest n0 from which on half of the samples lie in a ball of probability 1/2 + delta.

    Beyond ten million, Hoeffding's n0, which is a little larger.
    """
    # Hoeffding's n is enough, so that the scan ends there.
    enough = hoeffding_n0(delta, alpha)
    if enough > 10**7:
        return enough
    n = np.arange(1, 2 + enough)
    fails = stats.binom.cdf((n + 1) // 2 - 1, n, 0.5 + delta) > alpha
    return int(n[fails].max(initial=0)) + 1


def hoeffding_n0(delta: float, alpha: float) -> int:
    """The n0 from which on Hoeffding's inequality says the same: log(1 / alpha) / (2 delta^2)."""
    if delta < 1e-9 or alpha < 1e-300:
        return 2**62
    return math.ceil(math.log(1 / alpha) / (2 * delta**2))


def half(n: int) -> int:
    """Number of samples that a ball about a center holds: at least half."""
    return (n + 1) // 2


@functools.partial(jax.jit, static_argnames=("divergence", "mesh"))
def enclose(
    encoder: Encoder,
    image: Array,
    representations: Array,
    rank: Array,
    *,
    divergence: str,
    mesh: Mesh,
) -> Center:
    """Finds the sample whose median distance to all samples is smallest.

    Any sample inside the smallest ball that holds half of the samples has half of them within twice
    that ball's radius; so has the sample found.

    Args:
      encoder: the encoder.
      image: [H,W,3] the clean image.
      representations: [n, D] float32, the samples.
      rank: rank of the estimate among the distances from the center, counted from 1.
      divergence: a name of `ur_jax.distances` that is a metric.
      mesh: mesh of `ur_jax.devices.data_mesh`.

    Reference: Kumar and Goldstein (2021), section 3.1 (a 2-approximation of the ball).
    """
    n = representations.shape[0]
    finite = jnp.isfinite(representations).all(axis=1)
    representations = jnp.where(finite[:, None], representations, 0.0)
    medians = median_distances(representations, divergence=divergence, mesh=mesh)
    center = representations[jnp.argmin(medians)]
    to_center = functools.partial(distance, divergence=divergence)
    away = jnp.sort(to_center(representations, jnp.broadcast_to(center, representations.shape)))
    error = to_center(encoder(image[None])[0], center)
    return Center(center, away[half(n) - 1], error, away[rank - 1], (~finite).sum())


def median_distances(representations: Array, *, divergence: str, mesh: Mesh) -> Array:
    """Median distance of every sample to all samples, in blocks of rows divided over the devices.

    Args:
      representations: [n, D] float32, finite.
      divergence: a name of `ur_jax.distances`.
      mesh: mesh of `ur_jax.devices.data_mesh`.

    Returns:
      [n] float32: the ceil(n / 2)-th smallest distance, the sample itself (at 0) included. Memory
      beyond the arguments: a block of distances on each device, [128, n] on a CPU and at most
      [1024, n] elsewhere.
    """
    n = representations.shape[0]
    most = _ROW_BLOCK.get(mesh.devices.flat[0].platform, _DEFAULT_ROW_BLOCK)
    blocks = math.ceil(n / (most * mesh.size))
    row_block = _ROWS * math.ceil(n / (blocks * mesh.size * _ROWS))  # no more padding than that
    rows = jnp.pad(representations, ((0, blocks * row_block * mesh.size - n), (0, 0)))

    def share(rows, representations):
        def block(rows):
            distances = pairwise_distances(rows, representations, divergence=divergence)
            return kth_smallest(distances, half(n))

        return jax.lax.map(block, rows.reshape(blocks, row_block, -1)).ravel()

    medians = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(PartitionSpec(DATA_AXIS), PartitionSpec()),
        out_specs=PartitionSpec(DATA_AXIS),
        check_vma=False,
    )(rows, representations)
    return medians[:n]


def kth_smallest(distances, k):
    """The k-th smallest of each row of distances [M, N] float32 >= 0, exactly."""
    # Floats >= 0 are ordered as their bits are: bisect on the integer, one count per bit. A row is
    # read 31 times, which is less than a sort moves.
    bits = jax.lax.bitcast_convert_type(distances, jnp.int32)

    def halve(i, value):
        bit = jnp.int32(1) << (30 - i)
        below = (bits < (value + bit)[:, None]).sum(axis=1)
        return jnp.where(below < k, value + bit, value)

    value = jax.lax.fori_loop(0, 31, halve, jnp.zeros(distances.shape[0], jnp.int32))
    return jax.lax.bitcast_convert_type(value, jnp.float32)
