"""A section for a model's card: the numbers in Markdown, and the block that model hubs read.

    ur-jax card runs/bench/mine                      # of one encoder; or of one run's folder
    ur-jax card runs/bench/mine --out ROBUSTNESS.md

The block is a `model-index`, as YAML between two lines of `---`: it belongs at the head of the
card's file, the section below it anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from ur_jax import runs
from ur_jax.errors import UserError
from ur_jax.jobs.progress import console
from ur_jax.metrics import METRICS
from ur_jax.report import compare
from ur_jax.report.collect import Number
from ur_jax.runs import Row, Summary


@dataclasses.dataclass(frozen=True)
class Config:
    """Which results, and where to."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of an encoder in a benchmark's working directory, or of one run."""
    out: Path | None = None
    """File to write; by default it is printed."""
    name: str | None = None
    """Of the model; by default that of the folder."""


def main(config: Config) -> None:
    """Writes or prints the card.

    Raises:
      UserError: for a folder without results, or a file that is there already.
    """
    folder = runs.as_folder(config.run)
    text = card(config.name or folder.absolute().name, summaries(folder))
    if config.out is None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    if config.out.exists():
        raise UserError(f"Expected --out to be a new file, got {config.out}, which is there.")
    with runs.atomic_path(config.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    console.print(f"Written to {config.out}", markup=False, highlight=False)


def summaries(folder: Path) -> dict[str, Summary]:
    """{stage: summary} of an encoder's folder, or of one run's.

    Raises:
      UserError: if there is none, or one that cannot be read.
    """
    if (folder / "summary.json").exists():
        return {folder.name: Summary.read(folder / "summary.json")}
    found = {path.parent.name: Summary.read(path) for path in sorted(folder.glob("*/summary.json"))}
    if not found:
        several = any(folder.glob("*/*/summary.json"))
        raise UserError(
            f"Expected the folder of one encoder or of one run, got {folder}"
            + (
                ", which holds several encoders: give one of its folders."
                if several
                else ", which holds no results."
            )
        )
    return found


def card(name: str, found: dict[str, Summary]) -> str:
    """The card's text.

    Args:
      name: of the model.
      found: {stage: summary} of one encoder.
    """
    numbers = [Number(name, stage, each, row) for stage, each in found.items() for row in each.rows]
    columns = [c for labels in (False, True) for c in compare.columns(numbers, labels=labels)]
    if not columns:
        raise UserError(f"Expected results with numbers, got none of {', '.join(found)}.")
    shown = [(column, column.cells[name]) for column in columns]
    index = "\n".join(_index(name, shown, found))
    return f"---\n{index}\n---\n\n{_section(shown, found)}"


def _index(
    name: str, shown: list[tuple[compare.Compared, Row]], found: dict[str, Summary]
) -> Iterator[str]:
    """Lines of the `model-index`; JSON's texts and numbers are YAML's."""
    yield "model-index:"
    yield f"- name: {json.dumps(name)}"
    yield "  results:"
    for column, row in shown:
        if not math.isfinite(row.value):
            continue
        images = _images(found[column.stage])
        what = ", ".join(filter(None, (column.column.title, column.setting)))
        yield "  - task:"
        yield "      type: feature-extraction"
        yield "    dataset:"
        yield f"      type: {json.dumps(images)}"
        yield f"      name: {json.dumps(images)}"
        yield "    metrics:"
        yield f"    - type: {json.dumps(column.metric)}"
        yield f"      name: {json.dumps(what)}"
        yield f"      value: {json.dumps(row.value)}"


def _section(shown: list[tuple[compare.Compared, Row]], found: dict[str, Summary]) -> str:
    """The section in Markdown."""
    lines = [
        "## Robustness without labels",
        "",
        f"Measured on {' and '.join(dict.fromkeys(map(_images, found.values())))}; intervals at 95 "
        "%, over images; attacks in pixel units of [0, 1].",
        "",
        "| measure | value | 95 % interval | n | robust is | what |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for column, row in shown:
        what = ", ".join(filter(None, (column.column.title, column.setting)))
        interval = f"{row.low:.3f} to {row.high:.3f}" if math.isfinite(row.low + row.high) else ""
        definition = METRICS[column.metric].definition
        value = f"{row.value:.3f}" if math.isfinite(row.value) else "none"
        lines.append(
            f"| {what} | {value} | {interval} | {row.n} | {column.robust} | {definition} |"
        )
    lines += ["", f"Made by `ur_jax` ({_versions(found)}).", ""]
    return "\n".join(lines)


def _images(summary: Summary) -> str:
    """Which images a run was on, as its title has it; of a folder its name, and no place."""
    spec = summary.title.rpartition(" on ")[2]
    kind, _, place = spec.partition(":")
    return Path(place).name if kind == "folder" else spec


def _versions(found: dict[str, Summary]) -> str:
    """What made the numbers: weights, versions, device."""
    first: Any = next(iter(found.values()))
    made_by = first.provenance
    parts = [f"weights {str(first.identity.get('weights_sha256', ''))[:16]}"]
    parts += [f"{name} {version}" for name, version in made_by.get("versions", {}).items()]
    return ", ".join([*parts, str(made_by.get("device", ""))])
