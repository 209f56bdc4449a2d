"""Curves of shares: which share of the images has a certified value up to, or of at least, x."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ur_jax.stats import intervals

BAND = "Band: the 95 % interval of the share, at each x alone."
"""What a caption says of it."""


class Share(NamedTuple):
    """A step function of x: `value` from each x on, with its interval over images.

    Attributes:
      x: (K,) from 0 on, not decreasing.
      value, low, high: (K,) the share and the ends of its 95 % interval.
    """

    x: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def at_most(values: np.ndarray, total: int) -> Share:
    """Share of images whose value is at most x.

    Args:
      values: (M,) of the images that have one, >= 0.
      total: all images, also those without.
    """
    values = np.sort(values.astype(np.float64))
    return _share(values, np.arange(len(values) + 1), total)


def at_least(values: np.ndarray, total: int) -> Share:
    """Share of images whose value is at least x; arguments as of `at_most`.

    A value counts up to itself: the step down is just after it.
    """
    values = np.sort(values.astype(np.float64))
    # Just after the i-th smallest value, len - i - 1 images are left.
    return _share(values, np.append(len(values), np.arange(len(values))[::-1]), total)


def _share(values: np.ndarray, counts: np.ndarray, total: int) -> Share:
    """The step function that has `counts` (M+1,) of the images from 0 and from each value on."""
    x = np.append(0.0, values)
    return Share(x, counts / total, *intervals.proportion_bounds(counts, total))
