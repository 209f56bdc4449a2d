"""Label-free measures of robustness, each a function of representations or of their distances.

They return one value per image (or pair). `summarise` turns those into the reported number with
its interval, and `METRICS` says which number that is and which way robustness points. Breakaway
risk and nearest-neighbour accuracy come from the same count, `neighbour_ranks`, which passes a
bank of any size through the devices block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import ArrayLike

from ur_jax import distances as dist
from ur_jax.errors import unknown_name
from ur_jax.intervals import Estimate, mean_interval, median_interval, proportion_interval
from ur_jax.sharding import DATA_AXIS, pad_batch, replicate, shard
from ur_jax.types import Array, Key

# Levels at which the reference stores the distribution.
_LEVELS = np.concatenate([np.logspace(-9, -3, 100, endpoint=False), np.arange(1, 1000) / 1000])
_SPARE_NEIGHBOURS = 8
_SAME_DIRECTION = 2.0**-20  # in every coordinate of unit vectors


class Metric(NamedTuple):
    """How per-image values become a reported number, and which direction is robust."""

    statistic: str  # "median", "mean" or "proportion"
    robust: str  # "low" or "high"
    meaning: str


METRICS: dict[str, Metric] = {
    "universal_quantile": Metric("median", "low", "F(distance), untargeted attack"),
    "universal_quantile_targeted": Metric("median", "high", "F(distance to target)"),
    "relative_quantile": Metric("median", "high", "distance to target, now / at the start"),
    "normalised_distance": Metric("median", "low", "distance / median F, untargeted attack"),
    "cosine_similarity": Metric("median", "high", "cosine of clean and attacked, untargeted"),
    "breakaway_risk": Metric("mean", "low", "share of images nearer than the own clean one"),
    "top_1_accuracy": Metric("proportion", "high", "own clean image is the nearest"),
    "top_5_accuracy": Metric("proportion", "high", "own clean image is among the 5 nearest"),
    "adversarial_margin": Metric("median", "high", "margin ratio of a pair attacked both ways"),
    "overlap_risk": Metric("proportion", "low", "margin ratio < 0"),
}


def summarise(name: str, values: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """The reported number of one metric, with n and its confidence interval.

    Args:
      name: a key of `METRICS`; its `statistic` selects the interval (`ur_jax.intervals`).
      values: what the metric's function returned, one per independent image or pair [n].
      confidence: coverage of the interval, in (0, 1).

    Returns:
      value, low, high, n.

    Raises:
      ValueError: for an unknown metric, no values, NaN or infinite values, or values other than
        0 and 1 for a proportion.
    """
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    if METRICS[name].statistic == "median":
        return median_interval(values, confidence=confidence)
    if METRICS[name].statistic == "mean":
        return mean_interval(values, confidence=confidence)
    values = np.asarray(values, np.float64).ravel()
    bad = int(np.count_nonzero((values != 0.0) & (values != 1.0)))
    if bad:
        raise ValueError(f"Expected {name} of 0 or 1 per image, got {bad} others of {values.size}.")
    return proportion_interval(int(values.sum()), values.size, confidence=confidence)


# Distances against the distribution of clean distances.


@flax.struct.dataclass
class DistanceDistribution:
    """Empirical distribution F of the distances between pairs of clean images.

    Attributes:
      distances: all of them, ascending [P], float32.
      divergence: the one they were measured by (static).
    """

    distances: Array
    divergence: str = flax.struct.field(pytree_node=False)

    @property
    def median(self) -> Array:
        """Median distance, a scalar."""
        n = self.distances.shape[0]
        return 0.5 * (self.distances[(n - 1) // 2] + self.distances[n // 2])


@functools.partial(jax.jit, static_argnames="divergence")
def pairwise_within(representations: Array, mask: Array, *, divergence: str = "l2") -> Array:
    """Distances among the images of one batch, each pair once.

    Args:
      representations: [B, D], float32; a batch of 256 in the paper's protocol.
      mask: [B] bool, False on padding.
      divergence: one of `distances.DIVERGENCES`.

    Returns:
      [B (B - 1) / 2] float32 in the order (0, 1), (0, 2), ..., (1, 2), ...; inf where the mask
      excludes an image of the pair.
    """
    first, second = np.triu_indices(representations.shape[0], 1)
    pairs = dist.pairwise_distances(representations, divergence=divergence)[first, second]
    return jnp.where(mask[first] & mask[second], pairs, jnp.inf)


def distance_distribution(
    representations: Array, key: Key, *, divergence: str = "l2", batch_size: int = 256
) -> DistanceDistribution:
    """Distribution of the distances of all pairs within shuffled batches of clean images.

    Args:
      representations: [N, D], float32, N >= 2. The paper: N = 100,000, so 12.76 million pairs.
      key: shuffles the images; the only randomness.
      divergence: one of `distances.DIVERGENCES`.
      batch_size: images whose pairs are all taken, >= 2; the last batch may be smaller.

    Returns:
      The distribution. Working memory: three times the pairs, beside the representations.

    Raises:
      ValueError: for a bad shape or dtype, NaN or infinite rows, or a batch_size below 2.

    Reference: Petrov & Kwiatkowska (2022), section 4.
    """
    representations = _finite_matrix("representations", representations)
    dist.check_divergence(divergence)
    if representations.shape[0] < 2 or batch_size < 2:
        raise ValueError(
            f"Expected at least 2 images and batch_size >= 2 to form pairs, got "
            f"{representations.shape[0]} images and batch_size {batch_size}."
        )
    distances = _distances_within_batches(
        representations, key, divergence=divergence, batch_size=batch_size
    )
    return DistanceDistribution(distances, divergence)


@functools.partial(jax.jit, static_argnames=("divergence", "batch_size"))
def _distances_within_batches(
    representations: Array, key: Key, *, divergence: str, batch_size: int
) -> Array:
    """Sorted distances of `distance_distribution`."""
    n = representations.shape[0]
    size = min(batch_size, n)
    num_batches = -(-n // size)
    last = n - (num_batches - 1) * size
    num_pairs = (num_batches - 1) * size * (size - 1) // 2 + last * (last - 1) // 2
    order = jnp.resize(jax.random.permutation(key, n), (num_batches, size))
    mask = jnp.arange(num_batches * size).reshape(num_batches, size) < n

    def one_batch(batch):
        index, mask = batch
        return pairwise_within(representations[index], mask, divergence=divergence)

    return jnp.sort(jax.lax.map(one_batch, (order, mask)).ravel())[:num_pairs]


@functools.partial(jax.jit, static_argnames="nearest_level")
def universal_quantile(
    distribution: DistanceDistribution, distances: Array, *, nearest_level: bool = False
) -> Array:
    """F(d): the share of clean pairs at most this far apart.

    Args:
      distribution: F, by the same divergence as `distances`.
      distances: any shape, >= 0: to the own clean image (robust is low), or for a targeted
        attack to the target (robust is high); or a certified radius eps_out.
      nearest_level: False for the exact empirical F. True for the reference's look-up, which
        keeps F at the levels 0.001 ... 0.999 and 100 log-spaced ones in [1e-9, 1e-3) and
        returns the level whose distance is nearest.

    Returns:
      Shares in [0, 1], of the shape of `distances`, float32; NaN where the distance is NaN.

    Reference: Petrov & Kwiatkowska (2022), section 4; the look-up, the authors' code.
    """
    distances = jnp.asarray(distances, jnp.float32)
    n = distribution.distances.shape[0]
    if nearest_level:
        # n is static, so the positions are exact; in float32 they would be off at n = 12.76 M.
        position = _LEVELS * (n - 1)
        below, above = np.floor(position).astype(int), np.ceil(position).astype(int)
        low, high = distribution.distances[below], distribution.distances[above]
        stored = low + jnp.asarray(position - below, jnp.float32) * (high - low)
        nearest = jnp.argmin(jnp.abs(distances[..., None] - stored), axis=-1)
        share = jnp.asarray(_LEVELS, jnp.float32)[nearest]
    else:
        count = jnp.searchsorted(distribution.distances, distances, side="right")
        share = count.astype(jnp.float32) / n
    return jnp.where(jnp.isnan(distances), jnp.nan, share)


@jax.jit
def relative_quantile(distances: Array, initial_distances: Array) -> Array:
    """Distance to the target at some step of a targeted attack, relative to that at step 0.

    The paper calls this ratio a relative quantile; it is a ratio of distances.

    Args:
      distances: d(f(x_adv), f(x_target)) at the step of interest, any shape.
      initial_distances: the same after the random start.

    Returns:
      The ratio per image, >= 0; NaN or inf where the initial distance is 0. Robust is high.
    """
    return distances / initial_distances


@jax.jit
def normalised_distance(distribution: DistanceDistribution, distances: Array) -> Array:
    """Distance in units of the median distance between clean images, d / median F.

    Args:
      distribution: F, by the same divergence as `distances`.
      distances: any shape, >= 0.

    Returns:
      The ratio per image. F is taken as given: intervals over images do not include the error of
      its median.
    """
    return distances / distribution.median


@functools.partial(jax.jit, static_argnames="divergence")
def adversarial_margin(
    f_x: Array, f_y: Array, f_x_to_y: Array, f_y_to_x: Array, *, divergence: str = "l2"
) -> Array:
    """Margin ratio of pairs of images, each attacked towards the other.

        (d(f(x), f(y -> x)) - d(f(x), f(x -> y))) / d(f(x), f(y))

    Args:
      f_x: representations [B, D] of the images x, float32.
      f_y: of their partners y.
      f_x_to_y: of x attacked towards f(y).
      f_y_to_x: of y attacked towards f(x).
      divergence: one of `distances.DIVERGENCES`.

    Returns:
      Margin ratios [B]; below 0, the attacked y is nearer to f(x) than the attacked x is. NaN or
      inf where f(x) = f(y). Robust is high.

    Reference: Petrov & Kwiatkowska (2022), section 4.
    """
    d = functools.partial(dist.distance, f_x, divergence=divergence)
    return (d(f_y_to_x) - d(f_x_to_y)) / d(f_y)


@jax.jit
def overlap_risk(margins: Array) -> Array:
    """1.0 for a pair whose margin ratio is below 0, else 0.0; the mean is the overlap risk.

    Args:
      margins: what `adversarial_margin` returned, any shape.

    Returns:
      float32 of the same shape; NaN where the margin is NaN.
    """
    return jnp.where(jnp.isnan(margins), margins, (margins < 0).astype(jnp.float32))


# Breakaway risk and nearest-neighbour accuracy: one count over a streamed bank.


class Ranks(NamedTuple):
    """Per attacked image [Q], int32: bank images nearer than its own, and those compared with."""

    rank: Array
    compared: Array


class _Queries(NamedTuple):
    """The attacked images; one copy on each device."""

    adversarial: Array  # [Q, D]
    clean: Array  # [Q, D]
    own_index: Array  # [Q]


class _Counts(NamedTuple):
    """The running result; each device keeps its own, S of them."""

    nearer: Array  # [S, Q]
    compared: Array  # [S, Q]
    not_finite: Array  # [S], bank rows with NaN or inf


@flax.struct.dataclass
class RankState:
    """Accumulator of `neighbour_ranks`, made by `init_ranks`."""

    queries: _Queries
    counts: _Counts
    divergence: str = flax.struct.field(pytree_node=False)
    mesh: Mesh | None = flax.struct.field(pytree_node=False)


def neighbour_ranks(
    adversarial: Array,
    clean: Array,
    bank: Array | np.ndarray,
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
    a matrix product decides all pairs but those within its rounding error.

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
      ValueError: for shapes or dtypes that do not fit, own_index outside [-1, N), NaN or infinite
        representations.

    Reference: Petrov & Kwiatkowska (2022), section 4.
    """
    dist.check_representations(bank=bank)
    own_index = np.asarray(own_index)
    if own_index.size and not -1 <= own_index.min() <= own_index.max() < bank.shape[0]:
        raise ValueError(
            f"Expected own_index in [-1, {bank.shape[0]}), got {own_index.min()} to "
            f"{own_index.max()}; -1 is for an image that is not in the bank."
        )
    state = init_ranks(adversarial, clean, own_index, divergence=divergence, mesh=mesh)
    _check_same_dimension(adversarial, bank)
    return finish_ranks(_stream(update_ranks, state, bank, block_size, mesh))


def init_ranks(
    adversarial: Array,
    clean: Array,
    own_index: ArrayLike,
    *,
    divergence: str = "l2",
    mesh: Mesh | None = None,
) -> RankState:
    """Starts a count of `neighbour_ranks` (arguments there) whose blocks the caller supplies."""
    dist.check_divergence(divergence)
    adversarial = _finite_matrix("adversarial", adversarial)
    clean = _finite_matrix("clean", clean)
    own_index = np.asarray(own_index)
    if adversarial.shape != clean.shape or own_index.shape != adversarial.shape[:1]:
        raise ValueError(
            f"Expected adversarial and clean of equal shape [Q, D] and own_index [Q], got "
            f"{adversarial.shape}, {clean.shape} and {own_index.shape}."
        )
    if not np.issubdtype(own_index.dtype, np.integer):
        raise ValueError(f"Expected own_index of integers, got {own_index.dtype}.")
    if divergence == "cosine":
        adversarial, clean = dist.directions(adversarial), dist.directions(clean)
    queries = _Queries(adversarial, clean, own_index.astype(np.int32))
    devices = 1 if mesh is None else mesh.size
    zeros = np.zeros((devices, adversarial.shape[0]), np.int32)
    counts = _Counts(zeros, zeros.copy(), np.zeros(devices, np.int32))
    return RankState(*_place(mesh, queries, counts), divergence, mesh)


def update_ranks(state: RankState, block: Array, indices: Array, mask: Array) -> RankState:
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
    return state.replace(counts=counts)


def finish_ranks(state: RankState) -> Ranks:
    """Adds up the devices' counts; ValueError if the bank had rows with NaN or inf."""
    _refuse_not_finite("bank", int(jnp.sum(state.counts.not_finite)))
    return Ranks(jnp.sum(state.counts.nearer, axis=0), jnp.sum(state.counts.compared, axis=0))


@functools.partial(jax.jit, static_argnames=("divergence", "mesh"), donate_argnums=0)
def _count_block(counts, queries, block, indices, mask, *, divergence, mesh):
    """Counts of one block on top of `counts`, on each device for its share of the block."""

    def count(counts, queries, block, indices, mask):
        rows = dist.directions(block) if divergence == "cosine" else block
        candidates = mask & (indices != queries.own_index[:, None])
        rough, error = _rough_distances(queries.adversarial, rows, divergence)
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
        not_finite = counts.not_finite + _count_not_finite(block, mask)
        return _Counts(total[None], compared[None], not_finite)

    return _on_mesh(count, mesh)(counts, queries, block, indices, mask)


def _rough_distances(queries: Array, rows: Array, divergence: str) -> tuple[Array, Array]:
    """What orders the rows by distance to each query [Q, B], and a bound on its rounding error."""
    if divergence in ("l2", "cosine"):
        return dist.squared_l2_by_product(queries, rows)
    distances = dist.pairwise_distances(queries, rows, divergence=divergence)
    return distances, dist.relative_rounding(rows.shape[1]) * distances


def _order_of(difference: Array, divergence: str) -> Array:
    """What `_rough_distances` approximates, from the differences [..., D]."""
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


def breakaway_risk(ranks: Ranks, *, reference_batch_size: int | None = None) -> Array:
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


def nearest_neighbour_hits(ranks: Ranks, *, k: int) -> Array:
    """1.0 where the own clean image is among the k nearest of the attacked one, else 0.0.

    Ties count for the own image.

    Args:
      ranks: from `neighbour_ranks`.
      k: >= 1.

    Returns:
      [Q] float32; the mean is the top-k nearest-neighbour accuracy. Robust is high.
    """
    if k < 1:
        raise ValueError(f"Expected k >= 1, got {k}.")
    return (ranks.rank < k).astype(jnp.float32)


# Nearest neighbours themselves, for galleries and classification.


class Neighbours(NamedTuple):
    """The nearest rows of a bank, nearest first: indices [Q, k] int32, distances [Q, k]."""

    indices: Array
    distances: Array


def nearest_neighbours(
    queries: Array,
    bank: Array | np.ndarray,
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
    queries = _finite_matrix("queries", queries)
    _check_same_dimension(queries, bank)
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(f"Expected k in [1, {bank.shape[0]}], the rows of the bank, got {k}.")
    if divergence == "cosine":
        queries = dist.directions(queries)
    devices = 1 if mesh is None else mesh.size
    shape = (devices, queries.shape[0], k)
    best = Neighbours(np.zeros(shape, np.int32), np.full(shape, np.inf, np.float32))
    queries, state = _place(mesh, queries, (best, np.zeros(devices, np.int32)))

    def update(state, *block):
        return _nearest_in_block(state, queries, *block, divergence=divergence, mesh=mesh)

    best, not_finite = _stream(update, state, bank, block_size, mesh)
    _refuse_not_finite("bank", int(jnp.sum(not_finite)))
    indices, distances = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in best)
    distances, indices = jax.lax.sort((distances, indices), num_keys=2)
    return Neighbours(indices[:, :k], distances[:, :k])


@functools.partial(jax.jit, static_argnames=("divergence", "mesh"), donate_argnums=0)
def _nearest_in_block(state, queries, block, indices, mask, *, divergence, mesh):
    """The k best after one block, on each device for its share of the block."""

    def nearest(state, queries, block, indices, mask):
        best, not_finite = state
        rows = dist.directions(block) if divergence == "cosine" else block
        k = best.indices.shape[-1]
        rough, _ = _rough_distances(queries, rows, divergence)
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
        return Neighbours(kept[None], -negative[None]), not_finite + _count_not_finite(block, mask)

    return _on_mesh(nearest, mesh)(state, queries, block, indices, mask)


def knn_classify(
    train_representations: Array,
    train_labels: ArrayLike,
    test_representations: Array,
    *,
    k: int = 200,
    temperature: float = 0.07,
    block_size: int = 16384,
    mesh: Mesh | None = None,
) -> Array:
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
        raise ValueError(
            f"Expected one label >= 0 for each of {train_representations.shape[0]} training images,"
            f" got labels of shape {train_labels.shape}, smallest {train_labels.min(initial=0)}."
        )
    if not temperature > 0:
        raise ValueError(f"Expected temperature > 0, got {temperature}.")
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
        raise ValueError(f"Expected {predicted.shape} test labels, got {test_labels.shape}.")
    return proportion_interval(int(np.sum(predicted == test_labels)), predicted.size)


# What streaming needs.


def _stream(
    update: Callable[..., Any],
    state: Any,
    bank: Array | np.ndarray,
    block_size: int,
    mesh: Mesh | None,
) -> Any:
    """Folds `update(state, rows, indices, mask)` over equal blocks, one alive at a time."""
    if block_size < 1:
        raise ValueError(f"Expected block_size >= 1, got {block_size}.")
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


def _place(mesh: Mesh | None, replicated: Any, divided: Any) -> tuple[Any, Any]:
    """Puts the queries on every device and the running results each on their own."""
    if mesh is None:
        return jax.device_put((replicated, divided))
    return replicate(mesh, replicated), shard(mesh, divided)


def _on_mesh(fn: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`fn(state, queries, *block)` on each device's share of state and block, queries whole."""
    if mesh is None:
        return fn
    divided, whole = PartitionSpec(DATA_AXIS), PartitionSpec()
    specs = (divided, whole, divided, divided, divided)
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=divided)


def _count_not_finite(block: Array, mask: Array | bool = True) -> Array:
    """Number of unmasked rows that hold NaN or inf."""
    return jnp.sum(mask & ~jnp.all(jnp.isfinite(block), axis=-1))


def _finite_matrix(name: str, array: Array | np.ndarray) -> Array:
    """The float32 [rows, D] array on the device; ValueError if it is not one, or not finite."""
    dist.check_representations(**{name: array})
    if array.ndim != 2:
        raise ValueError(f"Expected {name} of shape [rows, D], got {array.shape}.")
    array = jnp.asarray(array)
    if not isinstance(array, jax.core.Tracer):
        _refuse_not_finite(name, int(_count_not_finite(array)))
    return array


def _refuse_not_finite(name: str, bad: int) -> None:
    """Raises ValueError if there are bad rows."""
    if bad:
        raise ValueError(
            f"Expected finite {name}, got {bad} rows with NaN or infinite values; check the "
            f"encoder's weights and dtype."
        )


def _check_same_dimension(queries: Array, bank: Array | np.ndarray) -> None:
    """Raises ValueError unless the bank is [N, D] with the D of the queries."""
    if bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"Expected a bank of shape [N, {queries.shape[1]}] to match the queries, got "
            f"{bank.shape}; are they from the same encoder and representation?"
        )
