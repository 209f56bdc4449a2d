"""The results of several people and machines as one static page and one CSV.

    ur-jax leaderboard ours/bench theirs/bench --out board

Each place is a benchmark's working directory. What was asked for has to be the same: images (by
content), protocol, settings of certificates, schema; the first place says what that is. Whatever
differs is left out in words, and the exit status is 1.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ur_jax import runs
from ur_jax.errors import UserError
from ur_jax.jobs.progress import console
from ur_jax.report import build, collect, page, paired
from ur_jax.report.collect import Results
from ur_jax.report.page import Block, Section
from ur_jax.runs import Summary


@dataclasses.dataclass(frozen=True)
class Config:
    """Which results, and where to."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Working directories of benchmarks."""
    out: Path = Path("leaderboard")
    """Folder of leaderboard.html and leaderboard.csv."""


def main(config: Config) -> int:
    """Writes the page and the table; returns 1 if something was left out, 0 otherwise.

    Raises:
      UserError: for no places, or one that is no working directory.
    """
    if not config.runs:
        raise UserError("Expected the working directories of benchmarks, got none.")
    found, left_out = merge([runs.as_folder(place) for place in config.runs])
    collect.write_csv(config.out / "leaderboard.csv", found.numbers)
    text = page.render(make_page(found, left_out))
    with runs.atomic_path(config.out / "leaderboard.html") as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    for line in left_out:
        console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{len(_encoders(found))} encoders, {len(found.numbers)} numbers: "
        f"{config.out / 'leaderboard.html'}, {config.out / 'leaderboard.csv'}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return int(bool(left_out))


def merge(places: Sequence[Path]) -> tuple[Results, list[str]]:
    """The comparable results of all places, and a line for each that is left out.

    Encoders of one label in several places are told apart by the place's name.

    Raises:
      UserError: for a place that is no working directory.
    """
    collected = {place: collect.collect(place) for place in dict.fromkeys(places)}
    labels = Counter(
        encoder for each in collected.values() for encoder in {e for e, _ in each.summaries}
    )
    found, left_out, reference = Results({}, {}, {}), [], {}
    for place, results in collected.items():
        left_out += [f"{'/'.join(key)} of {place}: {why}" for key, why in results.damaged.items()]
        for (encoder, stage), summary in results.summaries.items():
            label = encoder if labels[encoder] == 1 else f"{encoder} ({place.absolute().name})"
            label = label if (label, stage) not in found.summaries else f"{encoder} ({place})"
            first = reference.setdefault(stage, summary)
            if why := _differs(first, summary):
                left_out.append(f"{encoder}/{stage} of {place} is left out: {why}")
                continue
            found.summaries[label, stage] = summary
            found.folders[label, stage] = results.folders[encoder, stage]
    return found, left_out


def make_page(found: Results, left_out: Sequence[str]) -> page.Page:
    """The page."""
    encoders = _encoders(found)
    sections = (
        *build.comparison(found, encoders),
        Section("left-out", "Left out", list(_left_out(left_out))),
        Section("origin", "Where the numbers come from", list(_origin(found))),
    )
    summary = f"{len(encoders)} encoders, measured alike: the same images, protocol and settings."
    return page.Page("Leaderboard", "How easily do representations move?", (summary,), sections)


def _encoders(found: Results) -> list[str]:
    """Labels of all encoders."""
    return sorted({encoder for (encoder, _), each in found.summaries.items() if each.rows})


def _differs(first: Summary, second: Summary) -> str:
    """How two summaries of one stage were not asked the same; "" if they were."""
    if first.schema != second.schema:
        return f"schema {second.schema}, and not {first.schema}"
    differs = paired.difference(paired.asked(second), paired.asked(first))
    return "other {}, {} and not {}".format(*differs) if differs else ""


def _left_out(lines: Sequence[str]) -> Iterator[Block]:
    """What is not comparable, and why."""
    for line in lines or ("Nothing.",):
        yield page.Paragraph(line, "bad" if lines else "")


def _origin(found: Results) -> Iterator[Block]:
    """Who made what with which versions on which device; a row per encoder."""
    rows: dict[str, tuple[str, ...]] = {}
    for (encoder, _), summary in found.summaries.items():
        made_by = summary.provenance
        versions = ", ".join(f"{k} {v}" for k, v in made_by.get("versions", {}).items())
        weights = str(summary.identity.get("weights_sha256", ""))[:16]
        commit = build.short_commit(str(made_by.get("commit", "")))
        rows.setdefault(
            encoder, (encoder, weights, str(made_by.get("device", "")), versions, commit)
        )
    names = ("encoder", "weights", "device", "versions", "commit")
    yield page.plain_table(dict(zip(names, zip(*rows.values()))), text=names)
