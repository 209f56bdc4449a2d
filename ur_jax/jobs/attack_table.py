"""What each attack finds at which cost, on one page: `ur-jax attack-table`.

    python experiments/attack_table.py --encoders demo demo-robust --images demo \\
        --csv runs/attacks.csv

Attacks the same images of each encoder at each radius (linf) by the paper's steps, by steps of
eps/10, by momentum, by APGD on every objective, by Square, and takes the worst on each image
(`strong`). Beside these: one perturbation for all images, made on those of the bank that are not
attacked; APGD through random shifts (its images are measured as they are); APGD made on each of
the other encoders, and on all of them at once, if they look at the same pixels; and a patch, whose
ball is all of [0,1]. Prints a row for each: median l2 distance, universal quantile, breakaway risk,
top-1 accuracy, what it cost; seconds at the first radius include compiling. Rows are written to
--csv as they are finished; the same command again computes only those that are missing.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tyro

from ur_jax import runs
from ur_jax.attacks import StrongConfig
from ur_jax.checks import check_whole
from ur_jax.errors import UserError, unknown_name
from ur_jax.jobs import attack_table_kinds
from ur_jax.jobs.attack_table_kinds import Bench, Kind
from ur_jax.jobs.progress import console
from ur_jax.typed import check_types

COLUMNS = (
    *("encoder", "eps", "attack", "median_distance", "universal_quantile", "breakaway_risk"),
    *("top_1_accuracy", "gradient_steps", "queries", "seconds"),
)
_Key = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoders, on which images."""

    encoders: tuple[str, ...] = ("demo", "demo-robust")
    """Checkpoint directories, encoders that ship, or functions that make one."""
    images: str = tyro.MISSING
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    eps: tuple[float, ...] = (0.01, 0.05, 0.1)
    """Radii, linf, in pixel units."""
    num_images: int = 64
    """Attacked ones, evenly spaced."""
    num_clean: int | None = None
    """Images of the bank, evenly spaced; all by default."""
    budget: int = 50
    """Gradient steps of a start of the strong attacks."""
    only: tuple[str, ...] = ()
    """Names of attacks; all by default."""
    csv: Path | None = None
    """File of the rows, as CSV."""
    patch: int = 8
    """Side of the patch, in pixels."""
    seed: int = 0
    """Of every random draw."""

    def __post_init__(self):
        check_types(self, but=(tyro.MISSING,))
        check_whole(self, "num_images", "budget", "patch")
        check_whole(self, "num_clean", optional=True)
        check_whole(self, "seed", least=0)
        for eps in self.eps:
            StrongConfig(eps, self.budget)

    def others(self, encoder: str) -> tuple[str, ...]:
        """The encoders beside one."""
        return tuple(other for other in self.encoders if other != encoder)


def main(config: Config) -> int:
    """Computes the missing rows and prints all."""
    every = {each for encoder in config.encoders for each in _kinds(config, encoder)}
    for name in config.only:
        if name not in every:
            raise unknown_name("attack", name, sorted(every))
    done = _read(config.csv)
    rows: list[dict[str, Any]] = []
    for encoder in config.encoders:
        rows += [row for key, row in done.items() if key[0] == encoder]
        for row in _missing(config, encoder, done):
            rows.append(row)
            console.print(_line(row), highlight=False, markup=False, soft_wrap=True)
            if config.csv is not None:
                _write(config.csv, [*(r for r in done.values() if r not in rows), *rows])
    console.print(table(rows), highlight=False, markup=False, soft_wrap=True)
    return 0


def _kinds(config: Config, encoder: str) -> dict[str, Kind]:
    """{name: kind} of an encoder's rows."""
    return attack_table_kinds.kinds(config, config.others(encoder))


def _missing(config: Config, encoder: str, done: dict[_Key, Any]) -> Iterator[dict[str, Any]]:
    """Computes an encoder's rows that are not there."""
    missing = [
        (eps, name, kind)
        for eps in config.eps
        for name, kind in _kinds(config, encoder).items()
        if (not config.only or name in config.only)
        and (kind.takes_radius or eps == config.eps[0])
        and (encoder, f"{_radius(eps, kind):g}", name) not in done
    ]
    if not missing:
        return
    others = config.others(encoder)
    bench = Bench.open(config, encoder)
    possible = attack_table_kinds.kinds(config, tuple(bench.others))
    for other in (name for name in others if name not in bench.others):
        console.print(f"{encoder} and {other} look at other pixels: nothing is transferred.")
    for eps, name, kind in missing:
        if name in possible:
            row = _row(bench, eps, kind)
            yield {"encoder": encoder, "eps": _radius(eps, kind), "attack": name, **row}


def _radius(eps: float, kind: Kind) -> float:
    """Of a row: all of [0,1] for what takes none."""
    return eps if kind.takes_radius else 1.0


def _row(bench: Bench, eps: float, kind: Kind) -> dict[str, Any]:
    """The numbers of an attack; its seconds at the first radius include compiling."""
    run, gradient_steps, queries = kind.make(bench, eps)
    started = time.monotonic()
    found = jax.block_until_ready(run())
    seconds = time.monotonic() - started
    costs = {"gradient_steps": gradient_steps, "queries": queries, "seconds": seconds}
    return {**bench.measured(found), **costs}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    heads = [name.replace("_", " ") for name in COLUMNS]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *map(_line, rows)])


def _cells(row: dict[str, Any]) -> Iterator[str]:
    """A row's cells, as text."""
    decimals = {"median_distance": 3, "universal_quantile": 3, "breakaway_risk": 3}
    decimals |= {"top_1_accuracy": 3, "seconds": 1}
    for name in COLUMNS:
        value = row[name]
        yield f"{float(value):.{decimals[name]}f}" if name in decimals else str(value)


def _line(row: dict[str, Any]) -> str:
    """A row of it."""
    return f"| {' | '.join(_cells(row))} |"


def _read(path: Path | None) -> dict[_Key, dict[str, Any]]:
    """{(encoder, eps, attack): row} of what is finished."""
    if path is None or not path.exists():
        return {}
    rows = list(csv.DictReader(path.read_text().splitlines()))
    if rows and tuple(rows[0]) != COLUMNS:
        raise UserError(f"Expected a file of this command as --csv, got {path}; give another one.")
    return {(row["encoder"], f"{float(row['eps']):g}", row["attack"]): row for row in rows}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes all rows, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with runs.atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
