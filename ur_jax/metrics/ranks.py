"""How many clean images are nearer to an attacked one than its own: breakaway and top-k."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike

from ur_jax import distances as dist
from ur_jax.errors import UserError
from ur_jax.metrics.checks import count_unusable, in_range, matrix, refuse_unusable, usable_matrix
from ur_jax.metrics.streaming import check_same_dimension, on_mesh, place, rough_distances, stream
from ur_jax.types import AnyArray, Array, PerImage, Representations

_SAME_DIRECTION = 2.0**-20  # in every coordinate of unit vectors


class Ranks(NamedTuple):
    """Per attacked image [Q], int32: bank images nearer than its own, and those compared with."""

    rank: Array
    compared: Array


class _Queries(NamedTuple):
    """The attacked images; one copy on each device."""

    adversarial: Array  # [Q, D]
    clean: Array  # [Q, D]
    own_index: AnyArray  # [Q]


class _Counts(NamedTuple):
    """The running result; each device keeps its own, S of them."""

    nearer: AnyArray  # [S, Q]
    compared: AnyArray  # [S, Q]
    unusable: AnyArray  # [S], bank rows with NaN, inf or beyond what squares hold


@flax.struct.dataclass
class RankState:
    """Accumulator of `neighbour_ranks`, made by `init_ranks`."""

    queries: _Queries
    counts: _Counts
    divergence: str = flax.struct.field(pytree_node=False)
    mesh: Mesh | None = flax.struct.field(pytree_node=False)


def neighbour_ranks(
    adversarial: Representations,
    clean: Representations,
    bank: AnyArray,
    *,
    own_index: ArrayLike,
    divergence: str = "l2",
    block_size: int = 4096,
    mesh: Mesh | None = None,
) -> Ranks:
    """Counts for each attacked image the clean images that are nearer to it than its own.

        rank_i = #{x' != x_i in the bank: d(f(x_adv_i), f(x')) < d(f(x_adv_i), f(x_i))}

    `breakaway_risk` and `nearest_neighbour_hits` follow from it. The count is that of exact
    comparisons of the differences in float32, whatever the block size and the devices: a copy of
    the own image is never nearer, and an attack that changed nothing has rank 0. For l2 and cosine
    a matrix product decides all pairs but those within its rounding error, as it is estimated (see
    `distances.squared_l2_by_product`).

    An attacked representation that is NaN, infinite or beyond what float32 can square counts as
    infinitely far from its own: all images are nearer.

    Args:
      adversarial: f(x_adv) [Q, D], float32.
      clean: f(x) of the same images [Q, D], float32.
      bank: f of all clean images [N, D], float32: a NumPy array or memory map, of which only one
        block at a time is on the devices, or a JAX array.
      own_index: row of each image in the bank [Q], integers; -1 for one that is not in it.
      divergence: one of `distances.DIVERGENCES`.
      block_size: rows per block, >= 1, rounded up to a multiple of the devices. A device holds its
        share of the block (for cosine, twice) and about 5 Q x (rows of its share) numbers.
      mesh: from `sharding.data_mesh`: each block is divided over its devices and the queries are
        on all of them; the one collective adds up the counts at the end. Without: one device.

    Returns:
      rank and compared, the number of other images in the bank (N - 1, or N if not in it).

    Raises:
      UserError: for shapes or dtypes that do not fit, own_index outside [-1, N), clean
        representations or a bank that are not finite, or of a scale whose squares are not.

    Reference: Petrov & Kwiatkowska (2022), section 4.
    """
    dist.check_representations(bank=bank)
    own_index = np.asarray(own_index)
    if own_index.size and not -1 <= own_index.min() <= own_index.max() < bank.shape[0]:
        raise UserError(
            f"Expected own_index in [-1, {bank.shape[0]}), got {own_index.min()} to "
            f"{own_index.max()}; -1 is for an image that is not in the bank."
        )
    state = init_ranks(adversarial, clean, own_index, divergence=divergence, mesh=mesh)
    check_same_dimension(adversarial, bank)
    return finish_ranks(stream(update_ranks, state, bank, block_size, mesh))


def init_ranks(
    adversarial: Representations,
    clean: Representations,
    own_index: ArrayLike,
    *,
    divergence: str = "l2",
    mesh: Mesh | None = None,
) -> RankState:
    """Starts a count of `neighbour_ranks` (arguments there) whose blocks the caller supplies."""
    dist.check_divergence(divergence)
    adversarial, clean = matrix("adversarial", adversarial), usable_matrix("clean", clean)
    own_index = np.asarray(own_index)
    if adversarial.shape != clean.shape or own_index.shape != adversarial.shape[:1]:
        raise UserError(
            f"Expected adversarial and clean of equal shape [Q, D] and own_index [Q], got "
            f"{adversarial.shape}, {clean.shape} and {own_index.shape}."
        )
    if not np.issubdtype(own_index.dtype, np.integer):
        raise UserError(f"Expected own_index of integers, got {own_index.dtype}.")
    if divergence == "cosine":
        adversarial, clean = dist.directions(adversarial), dist.directions(clean)
    queries = _Queries(adversarial, clean, own_index.astype(np.int32))
    devices = 1 if mesh is None else mesh.size
    zeros = np.zeros((devices, adversarial.shape[0]), np.int32)
    counts = _Counts(zeros, zeros.copy(), np.zeros(devices, np.int32))
    return RankState(*place(mesh, queries, counts), divergence, mesh)


def update_ranks(
    state: RankState,
    block: Representations,
    indices: Int[AnyArray, " batch"],
    mask: Bool[AnyArray, " batch"],
) -> RankState:
    """Adds one block of the bank to the count.

    Args:
      state: its counts are donated: use the returned one from here on.
      block: representations [B, D], float32; B a multiple of the mesh's devices, and the same in
        every call to compile once.
      indices: [B] int32, the rows' places in the bank; each row once over all calls.
      mask: [B] bool, False on padding.

    Returns:
      The new state.
    """
    dist.check_representations(block=block)
    counts = _count_block(
        state.counts,
        state.queries,
        block,
        indices,
        mask,
        divergence=state.divergence,
        mesh=state.mesh,
    )
    return dataclasses.replace(state, counts=counts)


def finish_ranks(state: RankState) -> Ranks:
    """Adds up the devices' counts; UserError if the bank had rows that are not finite."""
    refuse_unusable("bank", int(jnp.sum(state.counts.unusable)))
    compared = jnp.sum(state.counts.compared, axis=0)
    lost = ~in_range(state.queries.adversarial)
    return Ranks(jnp.where(lost, compared, jnp.sum(state.counts.nearer, axis=0)), compared)


@functools.partial(jax.jit, static_argnames=("divergence", "mesh"), donate_argnums=0)
def _count_block(counts, queries, block, indices, mask, *, divergence, mesh):
    """Counts of one block on top of `counts`, on each device for its share of the block."""

    def count(counts, queries, block, indices, mask):
        rows = dist.directions(block) if divergence == "cosine" else block
        candidates = mask & (indices != queries.own_index[:, None])
        rough, error = rough_distances(queries.adversarial, rows, divergence)
        own = _order_of(queries.adversarial - queries.clean, divergence)[:, None]
        error = error + dist.relative_rounding(rows.shape[1]) * own
        nearer = candidates & (rough < own - error)
        undecided = candidates & (jnp.abs(rough - own) <= error)

        def compare_column(j, total):
            # Of block, not rows: normalised here, its rounding is the same in blocks of any size.
            row = dist.directions(block[j]) if divergence == "cosine" else block[j]
            closer = _is_nearer(queries.adversarial, row, queries.clean, divergence)
            return total + (closer & undecided[:, j]).astype(jnp.int32)

        total = counts.nearer[0] + jnp.sum(nearer, axis=1)
        total = dist.for_flagged_columns(undecided, compare_column, total)
        compared = counts.compared[0] + jnp.sum(candidates, axis=1)
        unusable = counts.unusable + count_unusable(block, mask)
        return _Counts(total[None], compared[None], unusable)

    return on_mesh(count, mesh)(counts, queries, block, indices, mask)


def _order_of(difference: Array, divergence: str) -> Array:
    """What `rough_distances` approximates, from the differences [..., D]."""
    if divergence in ("l2", "cosine"):
        return jnp.sum(difference**2, axis=-1)
    return dist.reduce_difference(difference, divergence)


def _is_nearer(query: Array, row: Array, own: Array, divergence: str) -> Array:
    """Whether d(query, row) < d(query, own), in sums whose terms are all 0 if row = own."""
    if divergence == "linf":
        return jnp.max(jnp.abs(query - row), -1) < jnp.max(jnp.abs(query - own), -1)
    if divergence == "l1":
        return jnp.sum(jnp.abs(query - row) - jnp.abs(query - own), axis=-1) < 0
    # (q - r)^2 - (q - o)^2 = (o - r) (q - r + q - o); not negative where q = o.
    closer = jnp.sum((own - row) * ((query - row) + (query - own)), axis=-1) < 0
    if divergence == "cosine":  # one direction, normalised in two programs, may differ by ulps
        closer &= jnp.max(jnp.abs(own - row), axis=-1) > _SAME_DIRECTION
    return closer


def breakaway_risk(ranks: Ranks, *, reference_batch_size: int | None = None) -> PerImage:
    """Per attacked image, the share of other images nearer to it than its own clean image.

    The mean over images estimates P(d(f(x_adv), f(x')) < d(f(x_adv), f(x))).

    Args:
      ranks: from `neighbour_ranks`.
      reference_batch_size: None for the definition. The authors' code sums the counts of its last
        batch of attacked images only and divides by all images and the whole bank; given their
        batch size, the values here have that figure as their mean (it is too low by the number
        of batches or so, and its interval means nothing).

    Returns:
      [Q] float32 in [0, 1]; NaN if nothing was compared. Robust is low.

    Reference: Petrov & Kwiatkowska (2022), section 4.
    """
    if reference_batch_size is None:
        return ranks.rank.astype(jnp.float32) / ranks.compared.astype(jnp.float32)
    n = ranks.rank.shape[0]
    last_batch = np.arange(n) >= (n - 1) // reference_batch_size * reference_batch_size
    whole_bank = ranks.compared.astype(jnp.float32) + 1.0  # their divisor counts the image itself
    return jnp.where(last_batch, ranks.rank.astype(jnp.float32) / whole_bank, 0.0)


def nearest_neighbour_hits(ranks: Ranks, *, k: int) -> PerImage:
    """1.0 where the own clean image is among the k nearest of the attacked one, else 0.0.

    Ties count for the own image.

    Args:
      ranks: from `neighbour_ranks`.
      k: >= 1.

    Returns:
      [Q] float32; the mean is the top-k nearest-neighbour accuracy. Robust is high.
    """
    if k < 1:
        raise UserError(f"Expected k >= 1, got {k}.")
    return (ranks.rank < k).astype(jnp.float32)
