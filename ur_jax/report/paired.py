"""Encoders compared image by image: on the same images, by every measure of the page's tables.

    comparison = compare(found, columns)
    for verdict in comparison.of("demo", "demo-robust"):
        print(verdict.sentence)

Every two encoders are tested by every measure, and the p-values adjusted for all of these tests.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from ur_jax.errors import UserError
from ur_jax.errors import shown as told
from ur_jax.jobs.base import JOBS
from ur_jax.metrics import METRICS
from ur_jax.report.collect import Results
from ur_jax.report.compare import Compared, columns
from ur_jax.report.compare import best as best_by_intervals
from ur_jax.runs import SETTINGS, Summary, shown
from ur_jax.runs.files import to_json
from ur_jax.runs.shown import Shown
from ur_jax.stats import paired
from ur_jax.stats.paired import Paired
from ur_jax.types import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.05
"""Above this adjusted p-value nothing is decided."""

_OF_ENCODER = (
    *("encoder", "representation", "dtype", "weights_sha256", "input_size", "preparation"),
    *("mean", "std", "network", "probe_representation", "requires"),
)
"""What an identity says of the encoder, and not of what was asked for."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One measure of two encoders.

    Attributes:
      first, second: the encoders.
      column: the measure.
      result: first - second, over the images that both have.
      p_value: adjusted for all measures and pairs of encoders.
      level: the p-value of `result` that would decide, whatever the other ones are.
    """

    first: str
    second: str
    column: Compared
    result: Paired
    p_value: float
    level: float

    @property
    def wins(self) -> dict[str, int]:
        """On how many images each encoder is the more robust one."""
        ahead = self.result.higher, self.result.lower
        ahead = ahead if self.column.robust == "high" else ahead[::-1]
        return dict(zip((self.first, self.second), ahead, strict=True))

    @property
    def winner(self) -> str | None:
        """The encoder that is more robust, if that is decided."""
        if self.p_value > LEVEL:
            return None
        if METRICS[self.column.metric].statistic == "mean":
            is_first = (self.result.difference.value > 0) == (self.column.robust == "high")
            return self.first if is_first else self.second
        return max(self.wins, key=self.wins.__getitem__)

    @property
    def sentence(self) -> str:
        """What was found, for a person."""
        result, wins = self.result, self.wins
        if self.winner is None:
            more = result.more_images(self.level)
            hope = f"; about {more:,} more images would, if they are like these" if more else ""
            return f"not decided by {result.n} images{hope}"
        loser = self.second if self.winner == self.first else self.first
        others = f" (worse on {wins[loser]})" if wins[loser] else ""
        return f"{self.winner} is better on {wins[self.winner]} of {result.n} images{others}"


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """All verdicts of a working directory."""

    verdicts: tuple[Verdict, ...]

    def __rich__(self) -> Table:
        """The verdicts, for `rich`."""
        table = Table("measure", "verdict", "difference", "p", box=box.SIMPLE_HEAD, show_edge=False)
        if doubts := self.disagreements():
            table.title = Text("\n".join(doubts), justify="left")
        for each in self.verdicts:
            value, low, high, _ = each.result.difference
            measure = " ".join((each.column.column.title, each.column.setting))
            ends = f"{value:.3f} ({low:.3f} to {high:.3f})"
            table.add_row(*map(Text, (measure, each.sentence, ends, f"{each.p_value:.1g}")))
        return table

    def __repr__(self) -> str:
        return f"Comparison({len(self.verdicts)} verdicts)"

    def to_dataframe(self):
        """A row per verdict, as pandas' or polars' data frame.

        Raises:
          UserError: if neither is installed.
        """
        return shown.to_dataframe(shown.to_arrow(self.records()))

    def to_json(self) -> str:
        """A list of the verdicts."""
        return to_json(self.records())

    def plot(self) -> Figure:
        """On how many images each encoder is the more robust one, as matplotlib's figure.

        Raises:
          MissingPackageError: without matplotlib, of the extra `report`.
        """
        from ur_jax.report import results

        return results.plot_comparison(self)

    def records(self) -> list[dict[str, Any]]:
        """The verdicts as dicts."""
        return [
                {
                    "first": each.first, "second": each.second, "metric": each.column.metric,
                    "setting": each.column.setting, "winner": each.winner,
                    **each.result.difference._asdict(),
                    "p_value": each.result.p_value, "p_adjusted": each.p_value,
                }
                for each in self.verdicts
            ]  # fmt: skip

    def of(self, first: str, second: str) -> list[Verdict]:
        """Those of two encoders, in the order of the columns."""
        return [each for each in self.verdicts if {each.first, each.second} == {first, second}]

    def winner(self, first: str, second: str, column: Compared) -> str | None:
        """Which of two encoders a measure decides for."""
        found = (each.winner for each in self.of(first, second) if each.column is column)
        return next(found, None)

    def best(self, column: Compared) -> str | None:
        """The encoder that is better than every other one, where that is decided.

        By the verdicts; where values per image are not kept, by the intervals (`compare.best`).
        """
        names = list(column.cells)
        if any(each.column is column for each in self.verdicts):
            wins = lambda name: all(
                self.winner(name, o, column) == name for o in names if o != name
            )
            return next((name for name in names if len(names) > 1 and wins(name)), None)
        place = best_by_intervals([column.cells[name] for name in names], column.robust)
        return None if place is None else names[place]

    def disagreements(self) -> list[str]:
        """Sentences on which order of two encoders the strongest attack found does not bear out.

        One for each measure that the protocol's attack decides and the strongest, by the same
        measure at the same eps, decides otherwise or not.
        """
        place = lambda v: (v.first, v.second, v.column.metric, _eps(v.column))
        strongest = {place(v): v for v in self.verdicts}
        found = []
        for weak in self.verdicts:
            first, second, metric, eps = place(weak)
            strong = strongest.get((first, second, f"strongest_{metric}", eps))
            if strong is None or weak.winner in (None, strong.winner):
                continue
            eps = math.nan if eps is None else eps
            other = f"by the strongest attack found {strong.winner} is: believe the latter"
            if strong.winner is None:
                other = "by the strongest attack found it is not decided"
            found.append(
                f"{weak.column.column.title}, eps {eps:g}: by the protocol's attack {weak.winner} "
                f"is more robust than {second if weak.winner == first else first}, {other}."
            )
        return found

    def ranks(self, column: Compared) -> dict[str, tuple[int, int]]:
        """{encoder: the first and the last rank that it may have}, 1 of the most robust one.

        Guarantee: with a probability of 95 % all ranges of all measures hold, as Holm's adjustment
        has all decided orders hold.
        """
        names = list(column.cells)
        winners = {
            frozenset((each.first, each.second)): each.winner
            for each in self.verdicts if each.column is column
        }  # fmt: skip
        found = {}
        for name in names:
            decided = [winners.get(frozenset((name, other))) for other in names if other != name]
            worse = sum(winner == name for winner in decided)
            better = sum(winner not in (None, name) for winner in decided)
            found[name] = 1 + better, len(names) - worse
        return found

    def ranking(self, column: Compared) -> str:
        """The encoders from the most robust one down: "a > b" is decided, "b, c" is not."""
        sign = -1.0 if column.robust == "high" else 1.0
        order = sorted(column.cells, key=lambda name: sign * column.cells[name].value)
        text = order[0]
        for above, below in itertools.pairwise(order):
            text += f" > {below}" if self.winner(above, below, column) == above else f", {below}"
        return text


def compare(found: Results, columns: Sequence[Compared]) -> Comparison:
    """Compares every two encoders of a working directory.

    Args:
      found: its results.
      columns: the measures, from `compare.columns`; those that say neither what is robust nor have
        values per image are left out, as are stages whose images or settings differ.
    """
    values = functools.cache(lambda encoder: dict(_values(found, encoder)))
    results: list[tuple[str, str, Compared, Paired]] = []
    for column in columns:
        for first, second in itertools.combinations(column.cells, 2):
            if not column.robust or not _same_request(found, column.stage, first, second):
                continue
            keys = [
                (column.stage, column.metric, *column.cells[name].setting)
                for name in (first, second)
            ]
            x, y = (values(name).get(key) for name, key in zip((first, second), keys))
            if x is not None and y is not None and (result := compare_values(x, y)):
                results.append((first, second, column, result))
    adjusted = paired.holm([result.p_value for *_, result in results])
    level = LEVEL / max(len(results), 1)
    verdicts = (Verdict(*each, p, level) for each, p in zip(results, adjusted, strict=True))
    return Comparison(tuple(verdicts))


def compare_summaries(first: Summary, second: Summary, names: tuple[str, str]) -> Comparison:
    """Compares two encoders by what one job each found on the same images.

    Args:
      first, second: with their values, as `Job.run` returns them.
      names: of the encoders.

    Raises:
      UserError: if they were not asked for the same, on the same images.
    """
    if differs := difference(asked(first), asked(second)):
        raise UserError(
            "Expected two runs that differ in nothing but the encoder, got {} {} and {}.".format(
                *differs
            )
        )
    places = (names[0], "run"), (names[1], "run")
    found = Results(dict(zip(places, (first, second))), {}, dict.fromkeys(places, Path()))
    shared = [c for by in (False, True) for c in columns(found.numbers, labels=by)]
    return compare(found, shared)


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """(name, one value, the other) of the first setting that differs; as protocol.eps of nested
    ones."""
    for key in dict.fromkeys((*first, *second)):
        mine, other = first.get(key), second.get(key)
        if mine == other:
            continue
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            inner = difference(mine, other)
            return inner and (f"{key}.{inner[0]}", *inner[1:])
        return key, told(mine), told(other)
    return None


def compare_values(first: Values, second: Values) -> Paired | None:
    """The comparison over the images that both have a value for.

    None where there are none, or for a mean of values outside of [0,1], of which no bounds are
    known.
    """
    x, y = _by_image(first), _by_image(second)
    common = sorted(x.keys() & y.keys())
    if not common:
        return None
    a, b = np.array([x[i] for i in common]), np.array([y[i] for i in common])
    statistic: Any = METRICS[first.metric].statistic
    if statistic != "median" and not 0.0 <= min(a.min(), b.min()) <= max(a.max(), b.max()) <= 1.0:
        return None
    return paired.compare(a, b, statistic=statistic)


def _eps(column: Compared) -> float | None:
    """Radius of a column's attack."""
    return next(iter(column.cells.values())).eps


def _by_image(values: Values) -> dict[tuple, float]:
    """{index of an image, or of both of a pair: its value}, without those that have none."""
    keys = map(tuple, np.asarray(values.index).reshape(len(values.value), -1).tolist())
    return {key: float(v) for key, v in zip(keys, values.value) if not math.isnan(v)}


def _values(found: Results, encoder: str) -> Iterator[tuple[tuple, Values]]:
    """(stage, metric and setting; values) of everything that an encoder's stages keep."""
    for (name, stage), summary in found.summaries.items():
        if name != encoder or summary.job not in JOBS:
            continue
        folder, siblings = found.folders[name, stage], found.siblings(encoder, stage)
        try:
            for each in summary.values or JOBS[summary.job].values(folder, summary, siblings):
                setting = tuple(getattr(each, field) for field in SETTINGS)
                yield (stage, each.metric, *setting), each
        except (UserError, OSError, KeyError, TypeError):
            continue  # of a table that cannot be read the page says so where it draws it


def _same_request(found: Results, stage: str, first: str, second: str) -> bool:
    """Whether two encoders were asked the same: images, protocol, settings."""
    summaries = [found.summaries.get((encoder, stage)) for encoder in (first, second)]
    requests = [None if summary is None else asked(summary) for summary in summaries]
    return requests[0] is not None and requests[0] == requests[1]


def asked(summary: Summary) -> Mapping[str, Any]:
    """What was asked for, whatever the encoder."""
    left_out = (*_OF_ENCODER, "minutes")  # the number of images that fitted counts
    found = {k: v for k, v in summary.identity.items() if k not in left_out}
    if isinstance(protocol := found.get("protocol"), dict):
        found["protocol"] = {k: v for k, v in protocol.items() if k != "batch_size"}
    return found
