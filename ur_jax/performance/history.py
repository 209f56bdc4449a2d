"""What was measured over time: a line of JSON for each time, kept in the tree.

    ur-jax throughput --preset toy --against torch --record "nothing else running"
    ur-jax throughput --history

A line has the date, commit, versions and device, what else the machine was doing, in the words of
whoever measured, and of each case the rate, ours over the others' and the bytes of an item. Rates
compare where device and words are the same; ratios, taken by turns, on a busy machine too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ur_jax import runs
from ur_jax.errors import DamagedError, UserError
from ur_jax.performance.suite import Result
from ur_jax.performance.work import NAME

PATH = Path(__file__).with_name("history.jsonl")
_CONTEXT = ("date", "device", "num_devices", "versions")
_KEPT = (
    *("work", "encoder", "dtype", "batch_size", "implementation"),
    *("unit", "rate", "low", "high", "ratio", "bytes_per_item"),
)
_DIGITS = 5


def line(results: Sequence[Result], context: Mapping[str, Any], note: str) -> dict[str, Any]:
    """What is kept of a measurement.

    Args:
      results, context: of `suite.run`.
      note: what else the machine was doing.

    Raises:
      UserError: for an empty note, or nothing measured.
    """
    check_record(note)
    if not results:
        raise UserError("Expected something measured to record, got no results.")
    commit = runs.provenance()["commit"]
    known = {name: context[name] for name in _CONTEXT}
    kept = [{name: _short(getattr(result, name)) for name in _KEPT} for result in results]
    return {**known, "commit": commit, "note": " ".join(note.split()), "results": kept}


def check_record(note: str) -> None:
    """Raises UserError for a note that says nothing, and in an installed package, whose history
    the next installation would replace."""
    if {"site-packages", "dist-packages"} & set(PATH.parts):
        raise UserError(
            f"Expected --record in a checkout of ur_jax, but this one is installed ({PATH}); keep "
            "the throughput.json that is in --out."
        )
    if not note.strip():
        raise UserError(
            f"Expected what else the machine was doing as --record, got {note!r}; for instance "
            "--record 'nothing else running'."
        )


def append(record: Mapping[str, Any], path: Path | None = None) -> None:
    """Adds a line to the history.

    Raises:
      OSError: where it cannot be written.
    """
    path = path or PATH
    before = path.read_text() if path.exists() else ""
    text = json.dumps(runs.plain(record), allow_nan=False)
    with runs.atomic_path(path) as temporary:
        temporary.write_text(f"{before}{text}\n")


def read(path: Path | None = None) -> list[dict[str, Any]]:
    """The lines, the oldest first; none where nothing was recorded.

    Raises:
      DamagedError: for a line that is none.
    """
    path = path or PATH
    if not path.exists():
        return []
    found = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(text)
            tuple(rows(record))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"line {number} is no measurement ({type(error).__name__}: {error})"
            raise DamagedError(path, what, "Take that line out.") from error
        found.append(record)
    return found


COLUMNS = ("date", "versions", "device", "work", "with", "rate", "MB each", "ours over", "machine")
"""Of the table, as `rows` gives them."""


def rows(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of a line, one for each case, with ours over each of the others."""
    versions = ", ".join(
        f"{name} {record['versions'][name]}"
        for name in ("jax", "torch")
        if name in record["versions"]
    )
    device = f"{record['num_devices']} x {record['device']}"
    case = lambda result: tuple(result[n] for n in ("work", "encoder", "dtype", "batch_size"))
    for ours in record["results"]:
        if ours["implementation"] != NAME:
            continue
        over = [
            f"{each['ratio']:.2f} {each['implementation']}"
            for each in record["results"]
            if each["implementation"] != NAME and case(each) == case(ours)
        ]
        moved = ours["bytes_per_item"]
        yield (
            record["date"],
            versions,
            device,
            ours["work"],
            f"{ours['encoder']} {ours['dtype']} {ours['batch_size']}",
            f"{ours['rate']:.4g} {ours['unit']}",
            "" if moved is None else f"{moved / 1e6:.3g}",
            "; ".join(over),
            record["note"],
        )


def _short(value: Any) -> Any:
    """A number with as many digits as are worth keeping."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
