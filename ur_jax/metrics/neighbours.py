"""Who is nearest in a bank of any size, for galleries and classification."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int32
from numpy.typing import ArrayLike

from ur_jax import distances as dist
from ur_jax.errors import UserError
from ur_jax.metrics.checks import count_unusable, refuse_unusable, usable_matrix
from ur_jax.metrics.streaming import check_same_dimension, on_mesh, place, rough_distances, stream
from ur_jax.stats.intervals import Estimate, proportion_interval
from ur_jax.types import AnyArray, Array, Representations

_SPARE_NEIGHBOURS = 8


class Neighbours(NamedTuple):
    """The nearest rows of a bank, nearest first: indices [Q, k] int32, distances [Q, k]."""

    indices: AnyArray
    distances: AnyArray


def nearest_neighbours(
    queries: Representations,
    bank: AnyArray,
    *,
    k: int,
    divergence: str = "l2",
    block_size: int = 4096,
    mesh: Mesh | None = None,
) -> Neighbours:
    """The k rows of the bank nearest to each query; of equally near ones, the first.

    Candidates are chosen per block by a matrix product (l2, cosine) with 8 to spare, then
    measured and ordered by the exact differences.

    Args:
      queries: representations [Q, D], float32.
      bank: representations [N, D], float32, streamed as in `neighbour_ranks`.
      k: in [1, N].
      divergence: one of `distances.DIVERGENCES`.
      block_size: rows per block, as in `neighbour_ranks`.
      mesh: as in `neighbour_ranks`; each device keeps its own k best, merged at the end.

    Returns:
      indices into the bank and distances.

    Raises:
      ValueError: for shapes or dtypes that do not fit, k out of range, NaN or infinite rows.
    """
    dist.check_divergence(divergence)
    dist.check_representations(bank=bank)
    queries = usable_matrix("queries", queries)
    check_same_dimension(queries, bank)
    if not 1 <= k <= bank.shape[0]:
        raise UserError(f"Expected k in [1, {bank.shape[0]}], the rows of the bank, got {k}.")
    if divergence == "cosine":
        queries = dist.directions(queries)
    devices = 1 if mesh is None else mesh.size
    shape = (devices, queries.shape[0], k)
    best = Neighbours(np.zeros(shape, np.int32), np.full(shape, np.inf, np.float32))
    queries, state = place(mesh, queries, (best, np.zeros(devices, np.int32)))

    def update(state, *block):
        return _nearest_in_block(state, queries, *block, divergence=divergence, mesh=mesh)

    best, unusable = stream(update, state, bank, block_size, mesh)
    refuse_unusable("bank", int(jnp.sum(unusable)))
    indices, distances = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in best)
    distances, indices = jax.lax.sort((distances, indices), num_keys=2)
    return Neighbours(indices[:, :k], distances[:, :k])


@functools.partial(jax.jit, static_argnames=("divergence", "mesh"), donate_argnums=0)
def _nearest_in_block(state, queries, block, indices, mask, *, divergence, mesh):
    """The k best after one block, on each device for its share of the block."""

    def nearest(state, queries, block, indices, mask):
        best, unusable = state
        rows = dist.directions(block) if divergence == "cosine" else block
        k = best.indices.shape[-1]
        rough, _ = rough_distances(queries, rows, divergence)
        num_candidates = min(k + _SPARE_NEIGHBOURS, rows.shape[0])
        _, chosen = jax.lax.top_k(-jnp.where(mask, rough, jnp.inf), num_candidates)
        chosen = jnp.sort(chosen, axis=-1)
        exact = jax.lax.map(
            lambda row: dist.reduce_difference(queries - rows[row], divergence), chosen.T
        ).T
        all_distances = [best.distances[0], jnp.where(mask[chosen], exact, jnp.inf)]
        all_indices = [best.indices[0], indices[chosen]]
        # top_k keeps the first of equals; the earlier place here has the smaller index.
        negative, place = jax.lax.top_k(-jnp.concatenate(all_distances, axis=1), k)
        kept = jnp.take_along_axis(jnp.concatenate(all_indices, axis=1), place, axis=1)
        return Neighbours(kept[None], -negative[None]), unusable + count_unusable(block, mask)

    return on_mesh(nearest, mesh)(state, queries, block, indices, mask)


def knn_classify(
    train_representations: Float32[AnyArray, "n dim"],
    train_labels: ArrayLike,
    test_representations: Float32[AnyArray, "q dim"],
    *,
    k: int = 200,
    temperature: float = 0.07,
    block_size: int = 16384,
    mesh: Mesh | None = None,
) -> Int32[Array, " q"]:
    """Labels by a vote of the k nearest training images, weighted by exp(cosine / temperature).

    Args:
      train_representations: [N, D], float32.
      train_labels: [N], integers >= 0.
      test_representations: [Q, D], float32.
      k: neighbours that vote, in [1, N].
      temperature: > 0.
      block_size: as in `nearest_neighbours`.
      mesh: as in `nearest_neighbours`.

    Returns:
      Predicted labels [Q], int32; of equal votes, the smallest label.

    Raises:
      ValueError: as `nearest_neighbours`, for labels that do not fit, or temperature <= 0.

    Reference: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
      Discrimination" (CVPR 2018), section 3.4; k and temperature are theirs.
    """
    train_labels = np.asarray(train_labels)
    if train_labels.shape != train_representations.shape[:1] or train_labels.min() < 0:
        raise UserError(
            f"Expected one label >= 0 for each of {train_representations.shape[0]} training images,"
            f" got labels of shape {train_labels.shape}, smallest {train_labels.min(initial=0)}."
        )
    if not temperature > 0:
        raise UserError(f"Expected temperature > 0, got {temperature}.")
    neighbours = nearest_neighbours(
        test_representations,
        train_representations,
        k=k,
        divergence="cosine",
        block_size=block_size,
        mesh=mesh,
    )
    labels = jnp.asarray(train_labels, jnp.int32)[neighbours.indices]
    # exp((cosine - 1) / temperature): the common factor keeps it from overflowing.
    weights = jnp.exp(-neighbours.distances / temperature)
    return _vote(labels, weights, num_classes=int(train_labels.max()) + 1)


@functools.partial(jax.jit, static_argnames="num_classes")
def _vote(labels: Array, weights: Array, *, num_classes: int) -> Array:
    """Label [Q] with the largest sum of weights [Q, k]; one neighbour at a time, to save memory."""

    def add(votes, neighbour):
        label, weight = neighbour
        return votes + weight[:, None] * jax.nn.one_hot(label, num_classes), None

    votes, _ = jax.lax.scan(add, jnp.zeros((labels.shape[0], num_classes)), (labels.T, weights.T))
    return jnp.argmax(votes, axis=-1).astype(jnp.int32)


def knn_accuracy(
    train_representations: Array,
    train_labels: ArrayLike,
    test_representations: Array,
    test_labels: ArrayLike,
    **settings: Any,
) -> Estimate:
    """Share of test images that `knn_classify` (settings there) labels right, with its interval."""
    test_labels = np.asarray(test_labels)
    predicted = np.asarray(
        knn_classify(train_representations, train_labels, test_representations, **settings)
    )
    if test_labels.shape != predicted.shape:
        raise UserError(f"Expected {predicted.shape} test labels, got {test_labels.shape}.")
    return proportion_interval(int(np.sum(predicted == test_labels)), predicted.size)
