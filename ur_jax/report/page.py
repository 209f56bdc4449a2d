"""The report as one HTML file that needs nothing else: tables that sort, figures, pictures.

The functions here return markup; `render` puts the parts into `page.html`, which has the style and
the script. Every text from outside is escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape as escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from ur_jax.report import collect as results
from ur_jax.report.compare import Column

_TEMPLATE = Path(__file__).with_name("page.html")
_ARROWS = {"high": "higher is robust", "low": "lower is robust"}
_LABELLED_ARROWS = {"high": "higher is better", "low": "lower is better"}
_LARGEST_WIDTH = 1400


def render(title: str, body: Iterable[str]) -> str:
    """The page.

    Args:
      title: of the window.
      body: markup of its parts.
    """
    return Template(_TEMPLATE.read_text()).substitute(title=escape(title), body="\n".join(body))


def comparison_table(encoders: Sequence[str], columns: Sequence[Column]) -> str:
    """A row per encoder, a column per metric; the best is marked where the intervals bear it out.

    Args:
      encoders: all of them.
      columns: from `comparison.columns`.
    """
    heads = ["<th><button>encoder</button></th>"]
    marked = []
    for column in columns:
        arrows = _LABELLED_ARROWS if column.headline.labels else _ARROWS
        ns = {row["n"] for row in column.cells.values()}
        lines = [column.setting, arrows.get(column.robust, "")]
        lines += [f"n = {ns.pop()}"] if len(ns) == 1 else [f"n = {min(ns)} to {max(ns)}"]
        small = "".join(f"<small>{escape(line)}</small>" for line in lines if line)
        heads.append(f"<th><button>{escape(column.headline.title)}{small}</button></th>")
        names = list(column.cells)
        place = results.best([column.cells[name] for name in names], column.robust)
        marked.append(None if place is None else names[place])
    body = []
    for encoder in encoders:
        cells = [f"<td>{escape(encoder)}</td>"]
        for column, best in zip(columns, marked):
            cells.append(_cell(column.cells.get(encoder), encoder == best))
        body.append(f"<tr>{''.join(cells)}</tr>")
    return _table(heads, body)


def correlation_table(found: Iterable[tuple[Column, Column, Any, int]]) -> str:
    """Rank correlations: a row per metric without labels, a column per metric with labels.

    Args:
      found: from `comparison.correlations`.
    """
    cells: dict[str, dict[str, str]] = {}
    heads: dict[str, None] = {}
    for first, second, correlation, n in found:
        row, column = (f"{c.headline.title}|{c.setting}" for c in (first, second))
        heads[column] = None
        if correlation is None:
            text = f'<td class="none" data-value="">n = {n}</td>'
        else:
            rho, tau, p_value, n = correlation
            text = (
                f'<td data-value="{rho!r}">{rho:+.2f}<small>tau {tau:+.2f}, n = {n}</small>'
                f"<small>p {p_value:.2g}</small></td>"
            )
        cells.setdefault(row, {})[column] = text
    head = ["<th><button>without labels</button></th>"]
    head += [f"<th><button>{_two_lines(column)}</button></th>" for column in heads]
    body = [
        f"<tr><td>{_two_lines(row)}</td>{''.join(by_column[c] for c in heads)}</tr>"
        for row, by_column in cells.items()
    ]
    return _table(head, body)


def plain_table(
    columns: Mapping[str, Sequence[Any]], *, identifier: str = "", text: Sequence[str] = ()
) -> str:
    """A table of plain values that sorts; with an identifier it scrolls and can be filtered.

    Args:
      columns: {heading: values}, of equal length.
      identifier: of the element; no two alike on a page.
      text: headings of the columns set to the left.
    """
    style = [' class="text"' if name in text else "" for name in columns]
    heads = [
        f"<th{kind}><button>{escape(name)}</button></th>" for kind, name in zip(style, columns)
    ]
    body = []
    for row in zip(*columns.values(), strict=True):
        cells = (f"<td{kind}{_data(v)}>{escape(_shown(v))}</td>" for kind, v in zip(style, row))
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = _table(heads, body, identifier)
    if not identifier:
        return table
    field = (
        f'<input data-filter="{escape(identifier)}" aria-label="Filter the rows" '
        'placeholder="Filter: words that a row must have">'
    )
    return field + table + paragraph("Long tables are left out on paper.", "paper")


def figure(markup: str, caption: str, files: str = "") -> str:
    """A figure with its caption.

    Args:
      markup: SVG, or an image from `picture`.
      caption: text.
      files: names of the same figure's files, if any.
    """
    note = f" Files: <code>{escape(files)}</code>." if files else ""
    return f"<figure>{markup}<figcaption>{escape(caption)}{note}</figcaption></figure>"


def picture(path: Path, alternative: str) -> str:
    """An image file, inside the page, as WebP.

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
    return (
        f'<img loading="lazy" width="{image.width}" height="{image.height}" '
        f'alt="{escape(alternative)}" src="data:image/webp;base64,{encoded}">'
    )


def section(title: str, identifier: str, *parts: str) -> str:
    """A part of the page under a heading that the contents link to."""
    return f'<section id="{identifier}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def fold(title: str, *parts: str, is_open: bool = False) -> str:
    """A part that opens on a click."""
    state = " open" if is_open else ""
    return f"<details{state}><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>'


def code(text: str) -> str:
    """A block of code or JSON."""
    return f"<pre><code>{escape(text)}</code></pre>"


def _cell(row: Mapping[str, Any] | None, is_best: bool) -> str:
    """A number with its interval."""
    if row is None:
        return '<td class="none" data-value="">missing</td>'
    value, low, high = (row[name] for name in ("value", "low", "high"))
    if value is None:
        return '<td data-value="Infinity">no finite value</td>'
    ends = "" if None in (low, high) else f"<small>{_digits(low)} to {_digits(high)}</small>"
    kind, mark = (' class="best"', " best") if is_best else ("", "")
    title = f"n = {row['n']}{mark}"
    return f'<td{kind} data-value="{value!r}" title="{title}">{_digits(value)}{ends}</td>'


def _digits(value: float) -> str:
    """Three decimals; two digits of what is nearer to 0 than those would show."""
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _table(heads: Sequence[str], body: Sequence[str], identifier: str = "") -> str:
    """A table inside a box that scrolls sideways."""
    name = f' id="{identifier}"' if identifier else ""
    tall = " tall" if identifier else ""
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    return (
        f'<div class="wide{tall}"><table{name}>{head}<tbody>{"".join(body)}</tbody></table></div>'
    )


def _two_lines(title: str) -> str:
    """A heading and its setting, "heading|setting"."""
    heading, _, setting = title.partition("|")
    return escape(heading) + (f"<small>{escape(setting)}</small>" if setting else "")


def _shown(value: Any) -> str:
    """A value as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _data(value: Any) -> str:
    """What a cell sorts by, if it is another text than the one shown."""
    return f' data-value="{value!r}"' if isinstance(value, float) and value == value else ""
