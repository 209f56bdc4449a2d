"""Confidence bounds of the mean of bounded values by betting: float64 on the host.

A gambler bets against the claim "the mean is m": his wealth grows where values lie above it. He
spreads it over fixed bets, so that neither the order of the values nor a variance guessed from them
enters, and one wealth serves a fixed number of values as well as one that grows.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from numpy.typing import ArrayLike

from ur_jax.checks import check_number
from ur_jax.errors import UserError

_BISECTIONS = 48
_SHARES = np.append(np.geomspace(1e-3, 0.9, 24), 1.0)
_PRIOR = np.append(np.full(24, 0.75 / 24), 0.25)


def mean_lower(values: ArrayLike, alpha: float, counts: ArrayLike | None = None) -> float:
    """Lower confidence bound of the mean of values in [0,1].

        W_n(m) = sum_j w_j prod_i (1 + g_j (x_i / m - 1)),    0 < g_j <= 1

    is a martingale that starts at 1 if m is the mean of every value given those before it: a
    gambler's wealth who stakes the share g_j of what he can lose. It falls with m. The bound is the
    largest m with W_n(m) >= 1 / alpha.

    **Guarantee.** P(bound > mean for some n) <= alpha (Ville), over independent values of one mean
    in [0,1], whatever their distribution: of one number of values, and of all numbers together, so
    that one may look after every value and stop whenever one likes. Values that are lowered, as by
    rounding them down to a few bins, can only lower the bound.

    Args:
      values: [n] in [0,1], n >= 1.
      alpha: failure probability, in (0,1).
      counts: [n] how often each value was seen; once by default.

    Returns:
      The bound, in [0,1], rounded down by bisection.

    Raises:
      UserError: for no values, values outside of [0,1] or NaN, or an alpha out of range.

    Reference: I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by betting"
    (2024), section 4; the mixture over fixed bets is ours.
    """
    check_number(SimpleNamespace(alpha=alpha), "alpha", above=0.0, below=1.0)
    values = np.asarray(values, np.float64).ravel()
    counts = np.ones(len(values)) if counts is None else np.asarray(counts, np.float64).ravel()
    seen = counts > 0
    values, counts = values[seen], counts[seen]
    if not values.size or not np.all((values >= 0) & (values <= 1)):
        raise UserError("Expected at least one value, all of them in [0,1].")
    low, high = 0.0, float(values @ counts / counts.sum())
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if middle > 0 and _log_wealth(values, counts, middle) >= -np.log(alpha):
            low = middle
        else:
            high = middle
    return low


def mean_upper(values: ArrayLike, alpha: float, counts: ArrayLike | None = None) -> float:
    """Upper confidence bound of the mean of values in [0,1]: 1 - the lower one of 1 - values."""
    return 1.0 - mean_lower(1.0 - np.asarray(values, np.float64), alpha, counts)


def _log_wealth(values: np.ndarray, counts: np.ndarray, mean: float) -> float:
    """Logarithm of what is left of 1 after betting against this mean."""
    with np.errstate(divide="ignore"):  # all that was staked on one bet may be lost
        factors = np.log1p(_SHARES[:, None] * (values / mean - 1.0))
    return float(np.logaddexp.reduce(factors @ counts + np.log(_PRIOR)))
