"""The report as one HTML file that needs nothing else: tables that sort, figures, pictures.

A page is plain data, the dataclasses here; `page.html`, a jinja template, has the markup, the style
and the script. Every text is escaped there.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ur_jax.errors import require
from ur_jax.metrics import METRICS
from ur_jax.report.compare import Compared, Correlation
from ur_jax.report.paired import Verdict
from ur_jax.runs import Row

_ARROWS = {"high": "higher is robust", "low": "lower is robust"}
_LABELLED_ARROWS = {"high": "higher is better", "low": "lower is better"}
_LARGEST_WIDTH = 1400


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table, or the heading of a column.

    Attributes:
      text: what it says.
      small: lines below it.
      sorted_by: what the column sorts by, where that is not the text.
      kind: class of the element: "best", "none", "text".
      title: what is told where the mouse rests.
    """

    text: str
    small: Sequence[str] = ()
    sorted_by: str | None = None
    kind: str = ""
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a section."""

    template: ClassVar[str]
    """Name of the template's macro that writes it."""


@dataclasses.dataclass(frozen=True)
class Paragraph(Block):
    """Plain text.

    Attributes:
      text: the text.
      kind: "soft", "bad" or ""; with " screen" behind it, it is left out on paper.
    """

    template: ClassVar[str] = "paragraph"
    text: str
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Heading(Block):
    """A heading within a section."""

    template: ClassVar[str] = "heading"
    text: str


@dataclasses.dataclass(frozen=True)
class Code(Block):
    """A command or JSON."""

    template: ClassVar[str] = "code"
    text: str


@dataclasses.dataclass(frozen=True)
class Table(Block):
    """A table that sorts; with an identifier it scrolls and can be filtered.

    Attributes:
      heads: headings of the columns.
      rows: cells, row by row.
      identifier: of the element; no two alike on a page.
    """

    template: ClassVar[str] = "table"
    heads: Sequence[Cell] = dataclasses.field(repr=False)
    rows: Sequence[Sequence[Cell]] = dataclasses.field(repr=False)
    identifier: str = ""


@dataclasses.dataclass(frozen=True)
class Figure(Block):
    """A figure with its caption.

    Attributes:
      caption: text.
      svg: markup of ours, put in as it is.
      data: what a pointer over it tells, `figures.data_of`; {} for nothing.
      picture: instead of it, see `Picture`.
      files: names of the same figure's files.
    """

    template: ClassVar[str] = "figure"
    caption: str
    svg: str = dataclasses.field(default="", repr=False)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    picture: Picture | None = None
    files: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image inside the page: WebP, in base64, with what it shows for those who cannot see it."""

    data: str = dataclasses.field(repr=False)
    width: int
    height: int
    alternative: str


@dataclasses.dataclass(frozen=True)
class Fold(Block):
    """A part that opens on a click."""

    template: ClassVar[str] = "fold"
    title: str
    blocks: Sequence[Block]
    is_open: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page under a heading that the contents link to."""

    identifier: str
    title: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
      title: of the window.
      heading: at the top, with `summary` below it.
      summary: a few sentences, in paragraphs.
      sections: in order.
    """

    title: str
    heading: str
    summary: Sequence[str]
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
      MissingPackageError: without jinja2, of the extra `report`.
    """
    jinja2 = require("jinja2", "report", "Writing the page")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(page=page)


def comparison_table(
    encoders: Sequence[str], columns: Sequence[Compared], winners: Sequence[str | None]
) -> Table:
    """A row per measure, a column per encoder.

    Args:
      encoders: all of them.
      columns: from `compare.columns`.
      winners: for each of them the encoder to mark as best, if there is one.
    """
    rows = [
        [_heading(column), *(_cell(column.cells.get(name), name == best) for name in encoders)]
        for column, best in zip(columns, winners, strict=True)
    ]
    return Table([Cell("measure"), *map(Cell, encoders)], rows)


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Two encoders, a row per measure: what is decided, and the difference that was found."""
    rows = []
    of = [f"{each.first} minus {each.second}" for each in verdicts[:1]]
    for verdict in verdicts:
        value, low, high, n = verdict.result.difference
        ends = f"{_digits(low)} to {_digits(high)}" if math.isfinite(low + high) else ""
        rows.append(
            [
                _heading(verdict.column),
                Cell(verdict.sentence, kind="text" if verdict.winner else "text none"),
                Cell(_digits(value), (ends,), title=f"{verdict.first} - {verdict.second}, n = {n}"),
                Cell(f"{verdict.p_value:.1g}"),
            ]
        )
    text = lambda name: Cell(name, kind="text")
    heads = (Cell("measure"), text("verdict"), Cell("difference", of), Cell("p, adjusted"))
    return Table(heads, rows)


def ranking_table(
    rankings: Iterable[tuple[Compared, str, Mapping[str, tuple[int, int]]]],
) -> Table:
    """A row per measure: the encoders in their order, and the ranks that each may have.

    Args:
      rankings: columns, with `Comparison.ranking` and `Comparison.ranks` of them.
    """
    rows = []
    for column, text, ranks in rankings:
        ranges: dict[tuple[int, int], list[str]] = {}
        for name, ends in sorted(ranks.items(), key=lambda item: item[1]):
            ranges.setdefault(ends, []).append(name)
        told = [
            f"{low}" + f" to {high}" * (high > low) + f": {', '.join(names)}"
            for (low, high), names in ranges.items()
        ]
        cells = (Cell(each, kind="text") for each in (text, "; ".join(told)))
        rows.append([_heading(column), *cells])
    heads = (Cell(each, kind="text") for each in ("order", "ranks, at 95 %"))
    return Table((Cell("measure"), *heads), rows)


def glossary(columns: Iterable[Compared]) -> Table:
    """What each measure is, where robust lies, and where it is defined; a row each."""
    rows: dict[str, list[Cell]] = {}
    for column in columns:
        metric, arrows = METRICS[column.metric], _arrows(column)
        source = f"paper, {metric.paper}" if metric.paper.startswith("section") else metric.paper
        texts = (metric.definition, arrows.get(column.robust, ""), source)
        rows[column.column.title] = [
            Cell(column.column.title), *(Cell(text, kind="text") for text in texts)
        ]  # fmt: skip
    heads = (Cell("measure"), *(Cell(each, kind="text") for each in ("what", "robust", "source")))
    return Table(heads, list(rows.values()))


def correlation_table(
    found: Iterable[tuple[Compared, Compared, Correlation | None, int]],
) -> Table:
    """Rank correlations: a row per metric without labels, a column per metric with labels.

    Args:
      found: from `compare.correlations`.
    """
    cells: dict[tuple[str, str], dict[tuple[str, str], Cell]] = {}
    heads: dict[tuple[str, str], None] = {}
    for first, second, correlation, n in found:
        row, column = ((each.column.title, each.setting) for each in (first, second))
        heads[column] = None
        if correlation is None:
            cell = Cell(f"n = {n}", kind="none", sorted_by="")
        else:
            rho, tau, p_value, n = correlation
            lines = f"tau {tau:+.2f}, n = {n}", f"p {p_value:.2g}"
            cell = Cell(f"{rho:+.2f}", lines, repr(rho))
        cells.setdefault(row, {})[column] = cell
    of = lambda title: Cell(title[0], title[1:])
    rows = [[of(row), *(by_column[c] for c in heads)] for row, by_column in cells.items()]
    return Table([Cell("without labels"), *map(of, heads)], rows)


def plain_table(
    columns: Mapping[str, Sequence[Any]], *, identifier: str = "", text: Sequence[str] = ()
) -> Table:
    """A table of plain values.

    Args:
      columns: {heading: values}, of equal length.
      identifier: of the element, see `Table`.
      text: headings of the columns set to the left.
    """
    kinds = ["text" if name in text else "" for name in columns]
    heads = [Cell(name, kind=kind) for name, kind in zip(columns, kinds)]
    rows = [
        [Cell(_shown(v), sorted_by=_sorted_by(v), kind=kind) for v, kind in zip(row, kinds)]
        for row in zip(*columns.values(), strict=True)
    ]
    return Table(heads, rows, identifier)


def picture(path: Path, alternative: str) -> Picture:
    """An image file as a part of the page.

    Args:
      path: any image that Pillow reads.
      alternative: what it shows, for those who cannot see it.
    """
    with path.open("rb") as file, Image.open(file) as image:
        image = image.convert("RGB")
    if image.width > _LARGEST_WIDTH:
        height = round(image.height * _LARGEST_WIDTH / image.width)
        image = image.resize((_LARGEST_WIDTH, height))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=85)
    encoded = base64.b64encode(data.getvalue()).decode()
    return Picture(encoded, image.width, image.height, alternative)


def _heading(column: Compared) -> Cell:
    """Heading of a measure: what it shows, under which settings, where robust is, of how many."""
    arrows = _arrows(column)
    ns = {row.n for row in column.cells.values()}
    count = f"n = {ns.pop()}" if len(ns) == 1 else f"n = {min(ns)} to {max(ns)}"
    facts = (column.setting, arrows.get(column.robust, ""), count)
    line = " · ".join(fact for fact in facts if fact)
    return Cell(column.column.title, (line,), title=METRICS[column.metric].definition)


def _arrows(column: Compared) -> dict[str, str]:
    """Which direction is good, in words."""
    return _LABELLED_ARROWS if column.column.labels else _ARROWS


def _cell(row: Row | None, is_best: bool) -> Cell:
    """A number with its interval."""
    if row is None:
        return Cell("missing", kind="none", sorted_by="")
    title = f"n = {row.n}" + (" best" if is_best else "")
    lines = ()
    if row.n_excluded:
        lines = (f"n = {row.n} of {row.n + row.n_excluded}",)
        title += f"; left out: {row.excluded or 'they have no value'}"
    if not math.isfinite(row.value):
        sorted_by = "-Infinity" if row.value < 0 else "Infinity"
        return Cell("no finite value", lines, sorted_by, title=title)
    if math.isfinite(row.low + row.high):
        lines = (f"{_digits(row.low)} to {_digits(row.high)}", *lines)
    return Cell(_digits(row.value), lines, repr(row.value), "best" if is_best else "", title)


def _digits(value: float) -> str:
    """Three decimals; two digits of what is nearer to 0 than those would show."""
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _shown(value: Any) -> str:
    """A value as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sorted_by(value: Any) -> str | None:
    """What a cell sorts by, if that is another text than the one shown."""
    return repr(value) if isinstance(value, float) and math.isfinite(value) else None
