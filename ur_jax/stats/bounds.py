"""Bounds on a probability and on a quantile from counts: float64 on the host, by SciPy.

Two kinds. A *fixed* bound holds at one number of samples chosen in advance (Clopper-Pearson, the
binomial order statistic, Hoeffding). A *confidence sequence* holds at all numbers of samples
together, so that one may look after every batch and stop whenever the answer is clear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy import special, stats

from ur_jax.checks import check_number, check_whole
from ur_jax.errors import UserError

Counts = np.ndarray | int
Probabilities = np.ndarray | float

_BISECTIONS = 64


def check_probability(name: str, value: Probabilities, *, inside: bool = True) -> None:
    """Raises UserError unless values are probabilities: in (0,1), or [0,1] if not `inside`."""
    above, below = (np.greater, np.less) if inside else (np.greater_equal, np.less_equal)
    ends = "strictly between 0 and 1" if inside else "in [0,1]"
    _check_all(name, ends, value, lambda values: above(values, 0) & below(values, 1))


def check_counts(n: Counts, successes: Counts = 0) -> None:
    """Raises UserError unless there are whole numbers of trials >= 1, and of successes up to n."""
    is_whole = lambda values: np.isfinite(values) & (values == np.floor(values))
    in_range = lambda n: is_whole(n) & (n >= 1) & (n < 2**31)
    _check_all("n", "of whole numbers >= 1, below 2^31", n, in_range)
    wanted = "of whole numbers, 0 <= successes <= n"
    fits = lambda k: is_whole(k) & (k >= 0) & (k <= np.asarray(n))
    _check_all("successes", wanted, successes, fits)


def _check_all(
    name: str, wanted: str, value: Any, is_right: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Raises UserError, naming the first one, unless real numbers are all right."""
    values = np.asarray(value)
    if values.size and np.issubdtype(values.dtype, np.number) and not np.iscomplexobj(values):
        right = is_right(values)
        if right.all():
            return
        value = np.broadcast_to(values, right.shape)[~right][0]
    raise UserError(f"Expected {name} {wanted}, got {value!s}.")


def check_level(level: float, what: str, sigma: float) -> None:
    """Raises UserError if the probability that `what` needs is 1, which no samples can show."""
    if level >= 1.0:
        raise UserError(
            f"Expected a probability below 1, but {what} at sigma {sigma:g} needs {level:.17g}, "
            "which no number of samples shows. Use a smaller radius or a larger sigma."
        )


def clopper_pearson_lower(successes: Counts, n: Counts, alpha: Probabilities) -> np.ndarray:
    """Exact lower confidence bound of a probability, 0 where there was no success.

    Args:
      successes: number of successes, 0 <= successes <= n.
      n: number of independent trials, fixed in advance, >= 1.
      alpha: probability that the bound exceeds the true probability, at most, in (0,1).

    Returns:
      The bound, float64, of the broadcast shape.

    Raises:
      UserError: for counts or an alpha out of range.

    Guarantee: P(bound > p) <= alpha for every p, over the n trials.

    Reference: Clopper and Pearson (1934).
    """
    check_counts(n, successes)
    check_probability("alpha", alpha)
    return _lower(successes, n, alpha)


def _lower(successes: Counts, n: Counts, alpha: Probabilities) -> np.ndarray:
    """The bound; of counts beyond n, which tables of thresholds ask for, it is meaningless."""
    successes, n = np.broadcast_arrays(np.asarray(successes), np.asarray(n))
    bound = stats.beta.ppf(alpha, np.maximum(successes, 1), n - successes + 1)
    return np.where(successes > 0, bound, 0.0)


def randomized_lower(
    successes: Counts, n: Counts, alpha: Probabilities, uniform: Probabilities
) -> np.ndarray:
    """Exact lower confidence bound of a probability that fails with probability alpha itself.

        the p with P(Bin(n, p) > k) + u P(Bin(n, p) = k) = alpha

    The count is discrete, so that Clopper-Pearson's bound fails more rarely than alpha. With a
    uniform u, drawn independently of the trials and kept beside the count, the left side is uniform
    itself, and nothing is left over. Above Clopper-Pearson's, which is u = 1, for every u.

    Args:
      successes: number of successes, 0 <= successes <= n.
      n: number of independent trials, fixed in advance, >= 1.
      alpha: failure probability, in (0,1).
      uniform: u, in [0,1]. Drawn once: to draw it again until the bound pleases is to cheat. A
        larger one gives a smaller bound; with u <= alpha that of n successes is 1.

    Returns:
      The bound, float64, of the broadcast shape, rounded down by bisection; 0 where there is none.

    Guarantee: P(bound > p) <= alpha for every p, over the n trials and u.

    Reference: Stevens (1950), "Fiducial limits of the parameter of a discontinuous distribution".
    """
    check_counts(n, successes)
    check_probability("alpha", alpha)
    check_probability("uniform", uniform, inside=False)
    k, n, u = np.broadcast_arrays(np.asarray(successes), np.asarray(n), np.asarray(uniform))
    low, high = np.zeros(k.shape), np.ones(k.shape)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        tail = stats.binom.sf(k, n, middle) + u * stats.binom.pmf(k, n, middle)
        low, high = np.where(tail <= alpha, middle, low), np.where(tail <= alpha, high, middle)
    return low


def clopper_pearson_upper(successes: Counts, n: Counts, alpha: Probabilities) -> np.ndarray:
    """Exact upper confidence bound of a probability: 1 - lower bound of the failures."""
    check_counts(n, successes)
    successes, n = np.broadcast_arrays(np.asarray(successes), np.asarray(n))
    return 1.0 - clopper_pearson_lower(n - successes, n, alpha)


def accepting_count(n: Counts, p: Probabilities, alpha: Probabilities) -> np.ndarray:
    """Smallest k with P(Bin(n, p) >= k) <= alpha; n + 1 where none has.

    Equivalently the smallest count whose Clopper-Pearson lower bound reaches p.
    """
    check_counts(n)
    check_probability("p", p, inside=False)
    check_probability("alpha", alpha)
    n, p = np.broadcast_arrays(np.asarray(n), np.asarray(p, np.float64))
    k = stats.binom.isf(alpha, n, p).astype(np.int64) + 1
    # SciPy's discrete inverse can be one off where the tail is within rounding of alpha.
    k = np.where(stats.binom.sf(k - 1, n, p) > alpha, k + 1, k)
    return np.minimum(k, n + 1)


def rejecting_count(n: Counts, p: Probabilities, alpha: Probabilities) -> np.ndarray:
    """Largest k with P(Bin(n, p) <= k) <= alpha; -1 where none has."""
    check_counts(n)
    check_probability("p", p, inside=False)
    n, p = np.broadcast_arrays(np.asarray(n), np.asarray(p, np.float64))
    return n - accepting_count(n, 1.0 - p, alpha)


def order_statistic_rank(n: int, p: float, alpha: float) -> int:
    """Rank of the sample that bounds a quantile from above, exactly.

        k = min {k : P(Bin(n, p) >= k) <= alpha}

    The k-th smallest sample lies below the p-quantile only if at least k of the n samples do,
    each with probability at most p. No continuity is assumed, and nothing is interpolated.

    Args:
      n: number of independent samples.
      p: level of the quantile, in (0,1).
      alpha: probability that the k-th smallest sample lies below the p-quantile, in (0,1).

    Returns:
      k, counted from 1.

    Raises:
      UserError: if even the largest sample is no such bound; names the n that would do.

    Reference: the binomial (distribution-free) confidence interval of a quantile.
    """
    _check_question(n, p, alpha)
    k = int(accepting_count(n, p, alpha))
    if k > n:
        # The largest sample will do once p^n <= alpha.
        needed = math.ceil(math.log(alpha) / math.log(p))
        raise UserError(
            f"Expected n >= {needed} to bound the {p:.6g}-quantile at alpha {alpha:g}, got {n}; "
            f"no order statistic of {n} samples is a bound. Use n = {needed} or more."
        )
    return k


def hoeffding_level(n: int, p: float, alpha: float) -> float:
    """Level of the sample quantile that bounds the p-quantile from above, as the reference has it.

        p + sqrt(log(1 / alpha) / (2 n))

    Args:
      n: number of independent samples.
      p: level of the quantile, in (0,1).
      alpha: failure probability, in (0,1).

    Returns:
      The level, at most 1.

    Raises:
      UserError: if the level exceeds 1; names the n that would do.

    Reference: Kumar and Goldstein (2021), Algorithm 2; Hoeffding's inequality.
    """
    _check_question(n, p, alpha)
    level = _hoeffding(n, p, alpha)
    if level > 1.0:
        needed = math.ceil(-math.log(alpha) / (2.0 * (1.0 - p) ** 2))
        raise UserError(
            f"Expected n >= {needed} for a quantile level of at most 1, got {n}, which needs the "
            f"level {level:.6g}. Use n = {needed} or more, or the bound 'exact'."
        )
    return level


def _hoeffding(n: int, p: float, alpha: float) -> float:
    """p + sqrt(log(1 / alpha) / (2 n)); of the smallest floats, 1 / alpha is none."""
    log = math.log(1.0 / alpha) if alpha > 1e-300 else -math.log(alpha)
    return p + math.sqrt(log / (2.0 * n))


def _check_question(n: int, p: float, alpha: float) -> None:
    """Raises UserError unless it is one number of samples, one level and one alpha."""
    question = SimpleNamespace(n=n, p=p, alpha=alpha)
    check_whole(question, "n")
    check_counts(n)
    check_number(question, "p", "alpha", above=0.0, below=1.0)


def interpolated_rank(n: int, level: float) -> float:
    """Where the published code reads a quantile: (n - 1) level, counted from 1.

    It interpolates linearly between the order statistics on either side.
    """
    return level * (n - 1) + 1


def check_interpolated(n: int, p: float, alpha: float) -> None:
    """Checks that the quantile read at `hoeffding_level` bounds the p-quantile from above.

    Hoeffding's inequality says it of the order statistic of rank ceil(n level) and up; what is read
    is an interpolation between two of which the lower one has a rank of at least n level - 1. So
    that one is held to the exact bound, P(Bin(n, p) >= rank) <= alpha: true but for a handful of
    samples.

    Args:
      n: number of independent samples.
      p: level of the quantile, in (0,1).
      alpha: failure probability, in (0,1).

    Raises:
      UserError: where it is no bound, or the level exceeds 1; names the n that would do.
    """
    hoeffding_level(n, p, alpha)  # which n is too few for a level at all
    if _is_interpolated_bound(n, p, alpha):
        return
    following = range(n + 1, n + 1000)
    holds = [_is_interpolated_bound(m, p, alpha) for m in following]
    failing = [m for m, right in zip(following, holds) if not right]
    needed = max(failing, default=n) + 1  # from which on it holds, as far as was looked
    raise UserError(
        f"Expected n >= {needed} for the published code's interpolated quantile to bound the "
        f"{p:.6g}-quantile at alpha {alpha:g}, got {n}: it lies below too often. Use n = {needed} "
        "or more, or the bound 'exact'."
    )


def _is_interpolated_bound(n: int, p: float, alpha: float) -> bool:
    """Whether the lower one of the two order statistics is an exact bound."""
    level = _hoeffding(n, p, alpha)
    rank = math.floor(interpolated_rank(n, min(level, 1.0)))
    return level <= 1.0 and rank >= int(accepting_count(n, p, alpha))


@dataclass(frozen=True)
class Betting:
    """Confidence sequence of a probability p by betting, with the Krichevsky-Trofimov mixture.

    The wealth of a gambler who mixes over all bets with the prior Beta(1/2, 1/2),

        M_n(p) = B(k + 1/2, n - k + 1/2) / B(1/2, 1/2) / (p^k (1 - p)^(n - k)),

    is a martingale that starts at 1 if p is the true probability. It reaches 2 / alpha with
    probability at most alpha / 2 (Ville), ever. The interval at n is {p : M_n(p) < 2 / alpha}:
    convex, since log M_n is. The other alpha / 2 goes to one Clopper-Pearson bound on either side
    at the cap, so that who is undecided until then loses next to nothing against a fixed bound.

    Guarantee: P(lower(k_n, n) > p for some n <= n_max) <= alpha, over the samples, whatever looks
    at the bounds, compares them with how many levels, and stops when. The same of the upper ends,
    with an alpha of their own.

    Attributes:
      alpha: failure probability of one side, in (0,1).
      n_max: the cap on the number of samples.

    Reference: Voracek (2024), confidence sequences by betting; Krichevsky and Trofimov (1981).
    """

    alpha: float
    n_max: int

    def __post_init__(self):
        check_number(self, "alpha", above=0.0, below=1.0)
        check_whole(self, "n_max")
        check_counts(self.n_max)

    def lower(self, successes: Counts, n: Counts) -> np.ndarray:
        """Returns the lower end after n samples, float64, rounded down by bisection."""
        k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
        mixture = _kt_log_probability(k, n)
        low, high = np.zeros(k.shape), k / n
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            excluded = mixture - _log_probability(k, n, middle) >= self._log_wealth
            low, high = np.where(excluded, middle, low), np.where(excluded, high, middle)
        last = _lower(k, n, self.alpha / 2)
        return np.where(n == self.n_max, np.maximum(low, last), low)

    def accepting(self, n: Counts, p: float) -> np.ndarray:
        """Returns the smallest count after n samples whose lower end reaches p; n + 1 if none."""
        n = np.asarray(n, np.int64)
        low, high = np.floor(n * p).astype(np.int64), n + 1  # the wealth grows with k above n p
        while np.any(high - low > 1):
            middle = (low + high) // 2
            wealth = _kt_log_probability(middle, n) - _log_probability(middle, n, p)
            accepts = wealth >= self._log_wealth
            open_ = high - low > 1
            high = np.where(open_ & accepts, middle, high)
            low = np.where(open_ & ~accepts, middle, low)
        last = accepting_count(n, p, self.alpha / 2)
        return np.where(n == self.n_max, np.minimum(high, last), high)

    @property
    def _log_wealth(self):
        """Logarithm of the wealth that excludes a probability."""
        return math.log(2 / self.alpha)


def _kt_log_probability(k, n):
    """Log probability that the Krichevsky-Trofimov mixture gives one sequence with k successes."""
    return special.betaln(k + 0.5, n - k + 0.5) - math.log(math.pi)


def _log_probability(k, n, p):
    """Log probability of one sequence with k successes in n trials."""
    return special.xlogy(k, p) + special.xlog1py(n - k, -p)


@dataclass(frozen=True)
class UnionBound:
    """Confidence sequence of a probability by Clopper-Pearson bounds at few numbers of samples.

    The numbers grow geometrically up to the cap. One half of alpha is shared equally by all but the
    last; the cap has the other half. (Voracek gives alpha / (i (i + 1)) to the i-th of an unbounded
    schedule; with a known cap, equal shares are tighter from the sixth on.)

    Guarantee: P(lower(k_n, n) > p for some n) <= alpha over the samples, and the same of the upper
    ends with an alpha of their own. At numbers of samples that are not scheduled there is no
    statement: the lower end is 0 and nothing can be decided.

    Attributes:
      alpha: failure probability of one side, in (0,1).
      n_max: the cap on the number of samples.
      step: the first scheduled number; all but the last are multiples of it.
      ratio: growth from one to the next, > 1.

    Reference: Voracek (2024), confidence sequences by the union bound.
    """

    alpha: float
    n_max: int
    step: int = 128
    ratio: float = 1.2

    def __post_init__(self):
        check_number(self, "alpha", above=0.0, below=1.0)
        check_whole(self, "n_max", "step")
        check_counts(np.array([self.n_max, self.step]))
        check_number(self, "ratio", above=1.0)

    @cached_property
    def schedule(self) -> np.ndarray:
        """The numbers of samples that have bounds, int64, increasing, ending at `n_max`."""
        exponents = np.arange(1 + math.ceil(math.log(self.n_max) / math.log(self.ratio)))
        multiples = self.step * np.round(self.ratio**exponents).astype(np.int64)
        return np.unique(np.minimum(multiples, self.n_max))

    def lower(self, successes: Counts, n: Counts) -> np.ndarray:
        """Returns the lower end after n samples, float64; 0 where n is not scheduled."""
        share = self._share(n)
        bound = _lower(successes, n, np.where(share > 0, share, 0.5))
        return np.where(share > 0, bound, 0.0)

    def accepting(self, n: Counts, p: float) -> np.ndarray:
        """Returns the smallest count after n samples whose lower end reaches p; n + 1 if none."""
        share = self._share(n)
        count = accepting_count(n, p, np.where(share > 0, share, 0.5))
        return np.where(share > 0, count, np.asarray(n) + 1)

    def _share(self, n):
        """Failure probability of the bound after n samples; 0 where none is scheduled."""
        earlier = max(len(self.schedule) - 1, 1)
        share = np.where(np.asarray(n) == self.n_max, self.alpha / 2, self.alpha / 2 / earlier)
        return np.where(np.isin(n, self.schedule), share, 0.0)


ConfidenceSequence = Betting | UnionBound


def upper(sequence: ConfidenceSequence, successes: Counts, n: Counts) -> np.ndarray:
    """Returns the upper end after n samples: 1 - the lower end of the failures."""
    return 1.0 - sequence.lower(np.asarray(n) - np.asarray(successes), n)


def rejecting(sequence: ConfidenceSequence, n: Counts, p: float) -> np.ndarray:
    """Returns the largest count after n samples whose upper end is at most p; -1 if none."""
    return np.asarray(n) - sequence.accepting(n, 1.0 - p)
