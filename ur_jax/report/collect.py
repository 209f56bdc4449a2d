"""All numbers of a working directory as one table.

A working directory holds one folder per encoder and stage, `WORKDIR/ENCODER/STAGE`, which one job
fills. Its `summary.json` carries the numbers as rows; here they become one table. No time and no
path enters it, so it is the same, byte for byte, whatever interrupted the jobs.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ur_jax import runs
from ur_jax.errors import UserError
from ur_jax.runs import Row, Summary

_NUMBER = ("value", "low", "high", "n", "n_excluded")

COLUMNS = (
    *("schema", "encoder", "stage", "metric", *runs.SETTINGS),
    *(*_NUMBER, "config", "weights"),
)
"""Columns of the table: `schema` is of the summary, `config` and `weights` are hashes."""


class Number(NamedTuple):
    """One reported number, with what reports it."""

    encoder: str
    stage: str
    summary: Summary
    row: Row

    def cells(self) -> dict[str, Any]:
        """Its line of the table, {column: value}; None where a setting does not apply."""
        names = ("metric", *runs.SETTINGS, *_NUMBER)
        return {
            "schema": self.summary.schema,
            "encoder": self.encoder,
            "stage": self.stage,
            **{name: getattr(self.row, name) for name in names},
            "config": self.summary.config,
            "weights": str(self.summary.identity.get("weights_sha256", ""))[:16],
        }


class Results(NamedTuple):
    """What is in a working directory.

    Attributes:
      summaries: {(encoder, stage): its summary}, sorted.
      damaged: {(encoder, stage): why its summary cannot be read, with the file's name}.
      folders: {(encoder, stage): where its tables lie}.
    """

    summaries: dict[tuple[str, str], Summary]
    damaged: dict[tuple[str, str], str]
    folders: dict[tuple[str, str], Path]

    def __repr__(self) -> str:
        return f"Results({len(self.summaries)} stages, {len(self.damaged)} damaged)"

    @property
    def numbers(self) -> list[Number]:
        """Every number, by encoder and stage."""
        return [
            Number(encoder, stage, summary, row)
            for (encoder, stage), summary in self.summaries.items()
            for row in summary.rows
        ]

    def siblings(self, encoder: str, stage: str) -> dict[str, Summary]:
        """The encoder's other stages, {stage: summary}."""
        return {
            name: summary
            for (other, name), summary in self.summaries.items()
            if other == encoder and name != stage
        }


def collect(workdir: Path) -> Results:
    """Reads every `WORKDIR/ENCODER/STAGE/summary.json`, but those of hidden folders.

    Args:
      workdir: the working directory.

    Returns:
      What was found; a summary that cannot be read is named in `damaged`, not raised.

    Raises:
      UserError: if the directory does not exist, or holds something else than results.
    """
    workdir = runs.as_folder(workdir)
    if not workdir.is_dir():
        raise UserError(f"Expected a working directory, found none at {workdir}.")
    summaries, damaged, folders = {}, {}, {}
    for path in sorted(workdir.glob("*/*/summary.json")):
        place = path.parent.parent.name, path.parent.name
        if any(name.startswith(".") for name in place):
            continue
        try:
            summaries[place], folders[place] = Summary.read(path), path.parent
        except (UserError, OSError) as error:
            damaged[place] = str(error)
    if not (summaries or damaged or any(workdir.glob("*/plan.json"))):
        raise UserError(_not_a_workdir(workdir))
    return Results(summaries, damaged, folders)


def write_csv(path: Path, numbers: Iterable[Number]) -> None:
    """Writes the table as CSV, atomically; an unset entry or a number not finite is empty.

    Numbers are written in full, so that reading gives the same float.
    """
    with (
        runs.atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_lines(numbers))


def _lines(numbers: Iterable[Number]) -> Iterator[list[Any]]:
    """The table's lines; None is written as nothing."""
    for number in numbers:
        cells = number.cells()
        yield [None if _is_not_finite(cells[name]) else cells[name] for name in COLUMNS]


def _is_not_finite(value: Any) -> bool:
    """Whether it is a number that CSV has no common form for."""
    return isinstance(value, float) and not math.isfinite(value)


def _not_a_workdir(workdir: Path) -> str:
    """Why there is nothing to report in a folder."""
    expected = "Expected a working directory with WORKDIR/ENCODER/STAGE/summary.json in it; "
    if (workdir / "summary.json").exists():
        return (
            f"{expected}{workdir} is the folder of one run, whose numbers are in its own "
            "summary.json. Run it with --out WORKDIR/ENCODER/STAGE to have it in a report."
        )
    if any(workdir.glob("*/summary.json")):
        return f"{expected}{workdir} looks like the folder of one encoder: give {workdir.parent}."
    return f"{expected}{workdir} has none: give the --workdir of a benchmark."
