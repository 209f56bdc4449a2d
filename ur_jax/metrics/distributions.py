"""Measures of distances: against the distribution of clean ones, against a start, between pairs."""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32

from ur_jax import distances as dist
from ur_jax.checks import check_key
from ur_jax.errors import UserError
from ur_jax.metrics.checks import in_range, usable_matrix
from ur_jax.types import AnyArray, Array, Key, PerImage, Representations

# Levels at which the reference stores the distribution.
_LEVELS = np.concatenate([np.logspace(-9, -3, 100, endpoint=False), np.arange(1, 1000) / 1000])


@flax.struct.dataclass
class DistanceDistribution:
    """Empirical distribution F of the distances between pairs of clean images.

    Attributes:
      distances: all of them, ascending [P], float32.
      divergence: the one they were measured by (static).
    """

    distances: Array
    divergence: str = flax.struct.field(pytree_node=False)

    def check(self, divergence: str | None) -> None:
        """Raises UserError for distances by another divergence; None is not known."""
        if divergence not in (None, self.divergence):
            raise UserError(
                f"Expected distances by {self.divergence}, as in the distribution, got "
                f"{divergence}; make one with divergence={divergence!r}."
            )

    @property
    def median(self) -> Array:
        """Median distance, a scalar."""
        n = self.distances.shape[0]
        return 0.5 * (self.distances[(n - 1) // 2] + self.distances[n // 2])


@functools.partial(jax.jit, static_argnames="divergence")
def pairwise_within(
    representations: Representations,
    mask: Bool[AnyArray, " batch"],
    *,
    divergence: str = "l2",
) -> Float32[Array, " pairs"]:
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
    representations: Representations, key: Key, *, divergence: str = "l2", batch_size: int = 256
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
    representations = usable_matrix("representations", representations)
    check_key(key)
    dist.check_divergence(divergence)
    if representations.shape[0] < 2 or batch_size < 2:
        raise UserError(
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


def universal_quantile(
    distribution: DistanceDistribution,
    distances: AnyArray,
    *,
    nearest_level: bool = False,
    divergence: str | None = None,
) -> Array:
    """F(d): the share of clean pairs at most this far apart.

    Args:
      distribution: F, by the same divergence as `distances`.
      distances: any shape, >= 0: to the own clean image (robust is low), or for a targeted
        attack to the target (robust is high); or a certified radius eps_out.
      nearest_level: False for the exact empirical F. True for the reference's look-up, which
        keeps F at the levels 0.001 ... 0.999 and 100 log-spaced ones in [1e-9, 1e-3) and
        returns the level whose distance is nearest.
      divergence: that the distances are by, to have it compared with the distribution's.

    Returns:
      Shares in [0, 1], of the shape of `distances`, float32; NaN where the distance is NaN.

    Raises:
      UserError: for distances by another divergence.

    Reference: Petrov & Kwiatkowska (2022), section 4; the look-up, the authors' code.
    """
    distribution.check(divergence)
    return _universal_quantile(distribution, distances, nearest_level=nearest_level)


@functools.partial(jax.jit, static_argnames="nearest_level")
def _universal_quantile(distribution, distances, *, nearest_level) -> Array:
    """`universal_quantile` without the check."""
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
def relative_quantile(distances: AnyArray, initial_distances: AnyArray) -> Array:
    """Distance to the target at some step of a targeted attack, relative to that at step 0.

    The paper calls this ratio a relative quantile; it is a ratio of distances.

    Args:
      distances: d(f(x_adv), f(x_target)) at the step of interest, any shape.
      initial_distances: the same after the random start.

    Returns:
      The ratio per image, >= 0; NaN or inf where the initial distance is 0. Robust is high.
    """
    return jnp.divide(distances, initial_distances)


def normalised_distance(
    distribution: DistanceDistribution, distances: AnyArray, *, divergence: str | None = None
) -> Array:
    """Distance in units of the median distance between clean images, d / median F.

    Args:
      distribution: F, by the same divergence as `distances`.
      distances: any shape, >= 0.
      divergence: that they are by, to have it compared with the distribution's.

    Returns:
      The ratio per image. F is taken as given: intervals over images do not include the error of
      its median.

    Raises:
      UserError: for distances by another divergence.
    """
    distribution.check(divergence)
    return _normalised_distance(distribution, distances)


@jax.jit
def _normalised_distance(distribution: DistanceDistribution, distances: AnyArray) -> Array:
    """`normalised_distance` without the check."""
    return jnp.divide(distances, distribution.median)


@functools.partial(jax.jit, static_argnames="divergence")
def adversarial_margin(
    f_x: Representations,
    f_y: Representations,
    f_x_to_y: Representations,
    f_y_to_x: Representations,
    *,
    divergence: str = "l2",
) -> PerImage:
    """Margin ratio of pairs of images, each attacked towards the other.

        (d(f(x), f(y -> x)) - d(f(x), f(x -> y))) / d(f(x), f(y))

    Args:
      f_x: representations [B, D] of the images x, float32.
      f_y: of their partners y.
      f_x_to_y: of x attacked towards f(y).
      f_y_to_x: of y attacked towards f(x).
      divergence: one of `distances.DIVERGENCES`.

    Returns:
      Margin ratios [B]; below 0, the attacked y is nearer to f(x) than the attacked x is. -inf, the
      worst, where an attacked representation is NaN, infinite or beyond what float32 can square;
      else NaN where f(x) = f(y). Robust is high.

    Reference: Petrov & Kwiatkowska (2022), section 4.
    """
    d = functools.partial(dist.distance, f_x, divergence=divergence)
    apart = d(f_y)
    margins = jnp.where(apart == 0.0, jnp.nan, (d(f_y_to_x) - d(f_x_to_y)) / apart)
    lost = in_range(f_x) & in_range(f_y) & ~(in_range(f_x_to_y) & in_range(f_y_to_x))
    return jnp.where(lost, -jnp.inf, margins)


@jax.jit
def overlap_risk(margins: Array) -> Array:
    """1.0 for a pair whose margin ratio is below 0, else 0.0; the mean is the overlap risk.

    Args:
      margins: what `adversarial_margin` returned, any shape.

    Returns:
      float32 of the same shape; NaN where the margin is NaN.
    """
    return jnp.where(jnp.isnan(margins), margins, (margins < 0).astype(jnp.float32))
