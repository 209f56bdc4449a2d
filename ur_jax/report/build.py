"""The report of a working directory: one HTML file that opens anywhere, and all numbers as CSV.

    ur-jax report runs/cifar

Reads what `benchmark` (or single jobs with --out WORKDIR/ENCODER/STAGE) left there and writes
`report.html`, which needs no network and no other file, `RESULTS.csv`, and each figure as PNG and
PDF in `figures/`. Nothing is computed anew, so that it may run while the benchmark does. A file
that cannot be read is named, everything else is reported, and the exit status is 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from ur_jax import runs
from ur_jax.errors import DamagedError
from ur_jax.jobs.progress import console
from ur_jax.report import collect, compare, drawn, page, paired
from ur_jax.report.compare import Compared
from ur_jax.report.page import Block, Section
from ur_jax.report.paired import Comparison
from ur_jax.runs import plan
from ur_jax.runs.summary import exclusions


@dataclasses.dataclass(frozen=True)
class Config:
    """Which results."""

    workdir: Annotated[Path, tyro.conf.Positional]
    """Working directory of a benchmark."""


def main(config: Config) -> int:
    """Writes the report; returns 1 if something there could not be read, 0 otherwise.

    Raises:
      UserError: for a folder that is no working directory, before anything is written.
      MissingPackageError: without the extra `report`, after RESULTS.csv is written.
    """
    workdir = runs.as_folder(config.workdir)
    material = read(workdir)
    found = material.found
    collect.write_csv(workdir / "RESULTS.csv", found.numbers)
    body = page.render(make_page(material))
    with runs.atomic_path(workdir / "report.html") as temporary:
        temporary.write_bytes(body.encode("utf-8", "backslashreplace"))
    damaged = [f"{'/'.join(place)}: {why}" for place, why in found.damaged.items()]
    for problem in (*damaged, *material.problems):
        console.print(problem, style="bold red", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{len(found.numbers)} numbers of {len(found.summaries)} stages: "
        f"{workdir / 'report.html'}, {workdir / 'RESULTS.csv'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return int(bool(damaged or material.problems))


class Material(NamedTuple):
    """What the report is made of.

    Attributes:
      workdir: the working directory.
      found: its numbers.
      planned: {encoder: what its plan.json says: a command, stages with what they lack}.
      records: {(encoder, stage): how a stage ran}.
      problems: a line for each file, other than a summary, that could not be used; more are added
        while the page is made.
    """

    workdir: Path
    found: collect.Results
    planned: dict[str, dict[str, Any]]
    records: dict[tuple[str, str], dict[str, Any]]
    problems: list[str]

    @property
    def encoders(self) -> list[str]:
        """Labels of all encoders: of those that have numbers, as a training has not, or should."""
        known = [encoder for (encoder, _), each in self.found.summaries.items() if each.rows]
        return sorted({*known, *(encoder for encoder, _ in self.found.damaged), *self.planned})


def read(workdir: Path) -> Material:
    """Reads a working directory; what is damaged is noted.

    Raises:
      UserError: for a folder that is none.
    """
    found, planned, problems = collect.collect(workdir), {}, []
    for path in sorted(workdir.glob("*/plan.json")):
        try:
            content = runs.read_json(path)
            planned[path.parent.name] = {
                "command": str(content["command"]),
                "stages": dict(content["stages"]),
            }
        except (DamagedError, OSError) as error:  # which names the file
            problems.append(str(error))
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path} is no plan ({error!r}): repeat the benchmark's command.")
    places = {*found.summaries, *found.damaged}
    places |= {(encoder, stage) for encoder, each in planned.items() for stage in each["stages"]}
    records = {place: plan.read_record(workdir.joinpath(*place)) for place in sorted(places)}
    return Material(workdir, found, planned, records, problems)


def make_page(material: Material) -> page.Page:
    """The page; writes the figures' files on the way."""
    found = material.found
    heading = "How easily do representations move?"
    summary = (
        f"{_measured(material)} {len(found.summaries)} finished stages, {len(found.numbers)} "
        "numbers, all in RESULTS.csv."
    )
    question = (
        "An attack changes each pixel, from 0 to 1, by at most eps, so that the representation of "
        "an image moves as far as it finds, or towards another image's; that of a robust encoder "
        "moves little. Intervals are at 95 %, over images. What a measure is, its name tells under "
        "the pointer, as does “What the measures are”."
    )
    place, problems = material.workdir, material.problems  # the figures may find some
    curves = list(drawn.curves(found, material.encoders, place / "figures", problems))
    pictures = list(drawn.pictures(found, place, problems))
    sections = (
        *comparison(found, material.encoders),
        Section("doubts", "Can they be trusted?", list(_doubts(found))),
        Section("curves", "Curves", curves or [_NOTHING]),
        Section("pictures", "Pictures", pictures or [_NOTHING]),
        Section("correlation", "Do they agree?", list(drawn.correlation(found, place / "figures"))),
        Section("missing", "Missing", list(_missing(material))),
        Section("numbers", "All numbers", list(_numbers(found))),
        Section("origin", "Where the numbers come from", list(_origin(material))),
    )
    title = f"Robustness without labels: {material.workdir.name}"
    return page.Page(title, heading, (summary, question), sections)


def _measured(material: Material) -> str:
    """Which encoders, on which images, by which preset, in how long: a sentence."""
    titles = [summary.title for summary in material.found.summaries.values()]
    images = dict.fromkeys(title.rpartition(" on ")[2] for title in titles)
    commands = (str(planned["command"]) for planned in material.planned.values())
    presets = dict.fromkeys(each for text in commands for each in _PRESET.findall(text))
    seconds = sum(float(record.get("seconds") or 0) for record in material.records.values())
    text = f"{', '.join(material.encoders) or 'No encoder'}"
    text += f" on {' and '.join(images)}" if images else ""
    text += f", preset {' and '.join(presets)}" if presets else ""
    return f"{text}, in {max(1, round(seconds / 60))} min." if seconds else f"{text}."


_PRESET = re.compile(r"--preset[ =](\S+)")

_MOST_DOUBTS = 6
"""Orders that do not hold under the strongest attack, told one by one."""

_NOTHING = page.Paragraph("Nothing is finished yet.", "soft")
"""What stands where there is nothing yet."""


def comparison(found: collect.Results, encoders: Sequence[str]) -> Iterator[Section]:
    """The sections that say which encoder is more robust, by what, and what that is."""
    by_labels = [compare.columns(found.numbers, labels=labels) for labels in (False, True)]
    columns = [column for each in by_labels for column in each]
    compared = paired.compare(found, columns)
    tables = [list(_table(encoders, each, compared)) for each in by_labels]
    meanings = [page.glossary(columns) if columns else _NOTHING]
    yield Section("verdict", "Which is more robust?", list(_verdict(encoders, columns, compared)))
    yield Section("labels-free", "Without labels", tables[0])
    yield Section("labels", "With labels", tables[1])
    yield Section("measures", "What the measures are", meanings)


def _verdict(
    encoders: Sequence[str], columns: Sequence[Compared], compared: Comparison
) -> Iterator[Block]:
    """What the comparison image by image says, first of two encoders each, then of all."""
    if len(encoders) < 2:
        yield page.Paragraph("One encoder: there is nothing to compare it with.", "soft")
        return
    if not compared.verdicts:
        yield page.Paragraph("No two encoders were measured on the same images yet.", "soft")
        return
    if len(encoders) > 2:
        yield page.Paragraph(_leaders(columns, compared))
    doubts = compared.disagreements()
    for doubt in doubts[:_MOST_DOUBTS]:
        yield page.Paragraph(doubt, "bad")
    if len(doubts) > _MOST_DOUBTS:
        yield page.Paragraph(f"And {len(doubts) - _MOST_DOUBTS} more such orders.", "bad")
    yield page.Paragraph(
        "All encoders are attacked on the same images, so they are compared image by image. "
        "Decided is what has a p-value below 5 % adjusted for every comparison here (Holm); "
        "medians by the sign test, shares by McNemar's, means by Gaffke's bounds.",
        "soft",
    )
    pairs = list(itertools.combinations(encoders, 2))
    if apart := [pair for pair in pairs if not compared.of(*pair)]:
        some = "; ".join(" and ".join(pair) for pair in apart[:_MOST_DOUBTS])
        some += f"; and {len(apart) - _MOST_DOUBTS} more" * (len(apart) > _MOST_DOUBTS)
        yield page.Paragraph(
            f"Not compared, as images or settings differ, or there is nothing yet: {some}.", "bad"
        )
        pairs = [pair for pair in pairs if pair not in apart]
    folds = [_pair(compared, *pair, is_open=len(pairs) == 1) for pair in pairs]
    if len(pairs) == 1:
        yield from folds
        return
    yield page.Paragraph(
        "From the most robust one down: “a > b” is decided between the two, “a, b” is not. All "
        "ranks together hold with a probability of 95 %.",
        "soft",
    )
    rankings = [
        (each, compared.ranking(each), compared.ranks(each)) for each in columns if each.robust
    ]
    yield page.ranking_table(rankings)
    yield page.Fold(f"Two by two ({len(pairs)} pairs)", folds)


def _leaders(columns: Sequence[Compared], compared: Comparison) -> str:
    """Which of several encoders is decided to be the best, by how many measures: a sentence."""
    asked = [column for column in columns if column.robust and len(column.cells) > 1]
    firsts = Counter(filter(None, map(compared.best, asked)))
    if not firsts:
        return f"By none of {len(asked)} measures one encoder is decided to be the most robust."
    found = ", ".join(f"{name} by {count}" for name, count in firsts.most_common())
    return f"Decided to be more robust than every other one: {found} of {len(asked)} measures."


def _pair(compared: Comparison, first: str, second: str, *, is_open: bool) -> Block:
    """What is decided between two encoders, by how many measures, and then by which."""
    found = compared.of(first, second)
    wins = {name: sum(v.winner == name for v in found) for name in (first, second)}
    title = f"{first} and {second}: " + "; ".join(
        f"{name} is more robust by {count} of {len(found)} measures"
        for name, count in sorted(wins.items(), key=lambda item: -item[1]) if count
    )  # fmt: skip
    if undecided := len(found) - sum(wins.values()):
        title += f"; {undecided} decide nothing"
    title = title if any(wins.values()) else f"{first} and {second}: nothing is decided"
    return page.Fold(title, [page.verdict_table(found)], is_open)


def _table(
    encoders: Sequence[str], columns: Sequence[Compared], compared: Comparison
) -> Iterator[Block]:
    """The numbers of the encoders, with or without labels."""
    if not columns:
        yield _NOTHING
        return
    yield page.Paragraph(
        "Value, and its 95 % interval over images. Marked is an encoder that is decided to be "
        "better than every other one. Distances are l2; the other divergences are under “All "
        "numbers”.",
        "soft",
    )
    winners = [compared.best(column) for column in columns]
    yield page.comparison_table(encoders, columns, winners)


def _doubts(found: collect.Results) -> Iterator[Block]:
    """What the evaluations doubt of themselves: signs that an attack was hindered or not done."""
    lines = [
        {"stage": "/".join(place), **doubt}
        for place, summary in found.summaries.items()
        for doubt in summary.details.get("doubts", ())
    ]
    if lines:
        columns = {
            heading: [line[name] for line in lines]
            for heading, name in (
                ("stage", "stage"), ("doubt", "name"), ("what was seen", "seen"),
                ("cause", "cause"), ("what to do", "remedy"),
            )
        }  # fmt: skip
        yield page.plain_table(columns, text=tuple(columns))
        return
    asked = [s for s in found.summaries.values() if "doubts" in s.details]
    has_strongest = any("strongest" in s.details for s in asked)
    if not found.summaries:
        yield _NOTHING
    elif not asked:
        yield page.Paragraph("Not looked at by the version that made these results.", "soft")
    elif has_strongest:
        yield page.Paragraph(
            "Nothing speaks against it: gradients were there, Square found no more than APGD, the "
            "budget sufficed, the starts agree, the clean representations are spread out."
        )
    else:
        yield page.Paragraph(
            "The clean representations are spread out. Whether attacks are hindered is known where "
            "the strongest attack is looked for: evaluate --stages strongest.",
            "soft",
        )


def _missing(material: Material) -> Iterator[Block]:
    """Stages that were planned and have no result, with the command that fills them; whatever
    could not be read."""
    damaged = dict(material.found.damaged)
    complete = not (damaged or material.problems)
    for encoder, known in sorted(material.planned.items()):
        rows = []
        for stage, reason in known["stages"].items():
            if (encoder, stage) in material.found.summaries:
                continue
            record = material.records[encoder, stage]
            error = str(record.get("error") or "").strip()
            reason = damaged.pop((encoder, stage), reason) or error.rpartition("\n")[2]
            state = "failed" if error else "begun" if record else "not begun"
            rows.append((stage, state, reason))
        if rows:
            complete = False
            columns: dict[str, Any] = dict(zip(("stage", "state", "why"), zip(*rows)))
            yield page.Heading(encoder)
            yield page.Code(known["command"])
            yield page.plain_table(columns, text=tuple(columns))
    for (encoder, stage), reason in damaged.items():
        yield page.Paragraph(f"{encoder}/{stage} cannot be read: {reason}", "bad")
    for problem in material.problems:
        yield page.Paragraph(problem, "bad")
    if complete:
        yield page.Paragraph(
            "Nothing: every planned stage is finished."
            if material.planned
            else "Not known: there is no plan.json, which a benchmark writes."
        )


def _numbers(found: collect.Results) -> Iterator[Block]:
    """Every number, in a table that can be filtered."""
    lines = [number.cells() for number in found.numbers]
    if not lines:
        yield _NOTHING
        return
    for sentence in exclusions(number.row for number in found.numbers):
        yield page.Paragraph(sentence)
    for place, summary in found.summaries.items():
        if summary.unreadable:
            yield page.Paragraph(_unreadable("/".join(place), summary.unreadable))
    excluded = any(line["n_excluded"] for line in lines)
    left_out = {"schema", "weights", *(() if excluded else ("n_excluded",))}
    names = [name for name in collect.COLUMNS if name not in left_out]
    columns = {name: [line[name] for line in lines] for name in names}
    text = ("encoder", "stage", "metric", "divergence", "images", "config")
    yield page.plain_table(columns, identifier="all-numbers", text=text)


def short_commit(commit: str) -> str:
    """The first digits of a commit, and whether there were changes besides."""
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def _unreadable(place: str, unreadable: Mapping[str, str]) -> str:
    """How many images of a stage were left out, and the first of them."""
    shown = [f"{name} ({why})" if why else name for name, why in [*unreadable.items()][:3]]
    more = ", ..." if len(unreadable) > 3 else ""
    return f"{place}: {len(unreadable)} unreadable images were left out: {', '.join(shown)}{more}"


def _origin(material: Material) -> Iterator[Block]:
    """Run time, hardware, versions and configuration of each stage."""
    if not material.found.summaries:
        yield _NOTHING
        return
    rows = []
    for place, summary in material.found.summaries.items():
        record, made_by = material.records[place], summary.provenance
        versions = made_by.get("versions", {})
        rows.append(
            {
                "stage": "/".join(place),
                "config": summary.config,
                "seconds": record.get("seconds"),
                "sessions": record.get("sessions"),
                "hosts": record.get("hosts"),
                "device": made_by.get("device"),
                "precision": made_by.get("matmul_precision"),
                "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
                "commit": short_commit(str(made_by.get("commit", ""))),
            }
        )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    same = ("device", "precision", "versions", "commit")
    common = [name for name in same if len(set(columns[name])) == 1 and len(rows) > 1]
    if common:
        shown = "; ".join(f"{name} {columns.pop(name)[0]}" for name in common)
        yield page.Paragraph(f"All stages: {shown}.")
    yield page.Paragraph(
        "Seconds are those of the last session; with more than one session the stage was "
        "interrupted and took longer in all. The hash of the configuration is the one in the "
        "table of all numbers.",
        "soft",
    )
    text = ("stage", "config", *same)
    yield page.plain_table(columns, identifier="all-stages", text=text)
    configurations = [
        page.Fold("/".join(place), [page.Code(json.dumps(summary.identity, indent=1))])
        for place, summary in material.found.summaries.items()
    ]
    yield page.Fold("Configuration of each stage", configurations)
