"""Integer noise on images of 256 grey values: Gaussian smoothing that is true of the program.

Float32 normals take 2^23 values, so that x + noise reveals x: an encoder can be built that treats
every draw about x in one way and everything else in another, and a certificate by such noise is
false of it. Here the encoder is smoothed after rounding to the grid of 1/255 and clipping to [0,1],
which is part of the function: a Gaussian added to a grid value and rounded is an added integer k,

    P(k) = Phi((k + 1/2) / s) - Phi((k - 1/2) / s),    s = 255 sigma,

and this k is drawn, by comparing 64-bit uniforms with integer thresholds. Nothing else of the
Gaussian is left in the program that could be told from the true one.

Of the 64 bits, bit 63 is the sign and the others are the tail's probability. The first 32 decide
but for one value in eight million; the other 32 are drawn for such values alone.

Reference: V. Voracek, M. Hein, "Sound randomized smoothing in floating-point arithmetic" (2023).
"""

from __future__ import annotations

import decimal
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.errors import UserError
from ur_jax.types import Array, Key

NOISES = ("float", "grid")
"""Kinds of noise: float32 normals, and what is described here."""

LEVELS = 255
"""Grey values are 0, ..., 255; noise beyond +-255 is clipped to the same."""

_GREY = (np.arange(LEVELS + 1) / LEVELS).astype(np.float32)
_TAIL = np.uint32(2**31 - 1)
_HAS_EDGE, _EDGE = np.uint32(2**22), np.uint32(2**22 - 1)
_COUNT = np.uint32(23)
_RARE = 2.0**-20
_SHIFT = 7  # of the first word's 31 bits, the other 24 are a float exactly


class GridNoise(NamedTuple):
    """Tables of one sigma; see `grid_noise`.

    A uniform v of 63 bits gives |k| = #{j : v < thresholds[j]}, j = 0, ..., 254, falling.

    Attributes:
      high: [255] uint32, upper 31 bits of the thresholds.
      low: [255] uint32, their lower 32 bits.
      cells: [C] uint32, 9 bits of how many thresholds every v of a cell is below, one bit of
      whether
        there is a threshold inside, and the last 22 of its upper 31 bits; all of the first 9 bits
        where there are several, and what falls there is looked up in `high` and `low`.
    """

    high: np.ndarray
    low: np.ndarray
    cells: np.ndarray


def total_variation(num_values: int, num_samples: int) -> float:
    """Total variation between the noise drawn and the true one, all samples together, at most.

    A threshold is rounded to a multiple of 2^-63, so wrong by 2^-64 and a probability by 2^-63: of
    the 256 values of |k|, half the sum is at most 2^-56.

    Args:
      num_values: of an image, height * width * channels.
      num_samples: samples drawn of it.
    """
    return num_values * num_samples * 2.0**-56


@functools.cache
def grid_noise(sigma: float) -> GridNoise:
    """The tables of a sigma in pixel units, > 0: the thresholds exact to 2^-64."""
    scale = 2**63
    thresholds = np.array([int(scale * p + decimal.Decimal("0.5")) for p in _tails(sigma)], object)
    high = (thresholds // 2**32).astype(np.uint32)
    low = (thresholds % 2**32).astype(np.uint32)
    for bits in range(8, 16):  # cells of a relative width of 2^-bits, until few hold several
        first = _first_of_cells(bits)
        inside = (high >= first[:-1, None]) & (high < first[1:, None])
        several = inside.sum(axis=1) > 1
        if np.diff(first)[several].sum() < 2**31 * _RARE:
            break
    edge = np.where(inside.any(axis=1), high[inside.argmax(axis=1)] & _EDGE | _HAS_EDGE, 0)
    count = np.where(several, 2**9 - 1, (high >= first[1:, None]).sum(axis=1))
    cells = count.astype(np.uint32) << _COUNT | edge.astype(np.uint32)
    return GridNoise(high, low, cells)


def check_grid(image: Array | np.ndarray) -> None:
    """Raises UserError unless an image's values are multiples of 1/255."""
    image = np.asarray(image, np.float32)
    levels = np.clip(np.round(image * LEVELS), 0, LEVELS).astype(int)
    if not np.allclose(_GREY[levels], image, rtol=0.0, atol=1e-6):
        raise UserError(
            "Expected an image of 256 grey values, k/255 each, for noise='grid', got others. Round "
            "it, np.round(255 * image) / 255, or use noise='float', which is not sound."
        )


def grid_samples(images: Array, keys: Key, tables: GridNoise) -> Array:
    """One noisy sample of each image: rounded to the grid of 1/255, clipped to [0,1].

    Args:
      images: [B,H,W,C] float32, multiples of 1/255 in [0,1].
      keys: [B], one for each sample.
      tables: of `grid_noise`.

    Returns:
      [B,H,W,C] float32, multiples of 1/255. Row b depends on its own image and key alone.
    """
    noise = integer_noise(keys, images.shape[1:], tables)
    levels = jnp.clip(jnp.round(images * LEVELS).astype(jnp.int32) + noise, 0, LEVELS)
    # By a table, since a compiler may divide by 255 in another way than whoever read the image.
    return jnp.asarray(_GREY).at[levels].get(mode="promise_in_bounds")


def integer_noise(keys: Key, shape: tuple[int, ...], tables: GridNoise) -> Array:
    """Integer noise [B, *shape] int32 in [-255, 255], of one key for each of B samples."""
    noise, has_rare = jax.vmap(lambda key: _by_first_word(key, shape, tables)[:2])(keys)

    def draw_again(left_and_noise):
        left, noise = left_and_noise
        at = jnp.argmax(left)
        return left.at[at].set(False), noise.at[at].set(_by_both_words(keys[at], shape, tables))

    return jax.lax.while_loop(lambda x: x[0].any(), draw_again, (has_rare, noise))[1]


def _by_first_word(key: Key, shape: tuple[int, ...], tables: GridNoise):
    """Noise by the first words, whether any leaves it open, the words, and which do."""
    words = jax.random.bits(jax.random.fold_in(key, 0), shape, jnp.uint32)
    tail = words & _TAIL
    cell = jnp.asarray(tables.cells).at[_cell(tail, len(tables.cells))].get(mode="clip")
    last, edge = tail & _EDGE, cell & _EDGE
    count = (cell >> _COUNT).astype(jnp.int32)
    rare = (last == edge) & (cell & _HAS_EDGE != 0) | (count == 2**9 - 1)
    count += (last < edge).astype(jnp.int32)
    return jnp.where(words > _TAIL, -count, count), rare.any(), words, rare


def _by_both_words(key: Key, shape: tuple[int, ...], tables: GridNoise):
    """Noise of one sample, where a second word decides one value after the other: they are few."""
    noise, _, words, rare = _by_first_word(key, shape, tables)
    high, low, words = jnp.asarray(tables.high), jnp.asarray(tables.low), words.reshape(-1)
    others = jax.random.fold_in(key, 1)

    def look_up(left_and_noise):
        left, noise = left_and_noise
        at = jnp.argmax(left)
        first = words[at] & _TAIL
        second = jax.random.bits(jax.random.fold_in(others, at), (), jnp.uint32)
        count = ((first < high) | ((first == high) & (second < low))).sum().astype(jnp.int32)
        return left.at[at].set(False), noise.at[at].set(jnp.where(words[at] > _TAIL, -count, count))

    start = rare.reshape(-1), noise.reshape(-1)
    return jax.lax.while_loop(lambda x: x[0].any(), look_up, start)[1].reshape(shape)


def _cell(tail: Array, num_cells: int) -> Array:
    """The cell of the first word: 0 of the smallest, then by exponent and leading bits."""
    bits = ((num_cells - 1) // 24).bit_length() - 1
    value = jax.lax.bitcast_convert_type((tail >> _SHIFT).astype(jnp.float32), jnp.int32)
    return jnp.maximum((value >> (23 - bits)) - ((127 << bits) - 1), 0)


def _first_of_cells(bits: int) -> np.ndarray:
    """The smallest first word of each cell, [C + 1] with the end of the last, int64."""
    codes = (np.arange(24 << bits, dtype=np.int32) + (127 << bits)) << (23 - bits)
    first = np.ceil(codes.view(np.float32).astype(np.float64)).astype(np.int64) << _SHIFT
    return np.concatenate([[0], first, [2**31]])


def _tails(sigma: float) -> list[decimal.Decimal]:
    """P(|k| > j) = erfc((j + 1/2) / (s sqrt 2)), j = 0, ..., 254; 0 beyond 12 s."""
    with decimal.localcontext(decimal.Context(prec=90)):
        number = decimal.Decimal
        scale = LEVELS * number(sigma) * number(2).sqrt()
        return [_erfc((j + number("0.5")) / scale) for j in range(LEVELS)]


def _erfc(x: decimal.Decimal) -> decimal.Decimal:
    """1 - erf(x) by its power series, which 90 digits allow up to x = 8.5; 0, to 1e-32, beyond."""
    number = decimal.Decimal
    if x > number("8.5"):
        return number(0)
    term, total, n = x, x, 0
    while abs(term) > number("1e-80"):
        n += 1
        term *= -x * x / n
        total += term / (2 * n + 1)
    return max(number(1) - 2 * total / _PI.sqrt(), number(0))


_PI = decimal.Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640629"
)
