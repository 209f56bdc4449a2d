"""The one form of a reported number, and the summary of a job: `summary.json`.

A `Row` goes from the job to `summary.json`, `RESULTS.csv`, the terminal and the page as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ur_jax.errors import DamagedError, UserError
from ur_jax.metrics.registry import METRICS
from ur_jax.runs import files, shown
from ur_jax.runs.provenance import SCHEMA, provenance
from ur_jax.runs.shown import Shown
from ur_jax.stats.intervals import Estimate
from ur_jax.types import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = ("divergence", "eps", "step", "radius", "images")
"""What a number was measured under; None where it does not apply."""

_READABLE = (2, SCHEMA)
_VARYING = ("times",)  # tables that differ from run to run


@dataclasses.dataclass(frozen=True)
class Row:
    """One reported number.

    Attributes:
      metric: a name of `metrics.METRICS`.
      value: the number.
      low, high: ends of its 95 % interval; NaN or infinite where there is none.
      n: images (or pairs) that it is over.
      divergence: "l1", "l2", "linf"; None where it has none.
      eps: radius of an attack, in pixel units.
      step: at which the attack was read.
      radius: of a certificate, l2, in pixel units.
      images: which ones, where there are several kinds: a probe's kind, an impersonation's
        direction.
      n_excluded: images (or pairs) that were asked for and have no value; n is without them.
      excluded: why they have none, in words.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    divergence: str | None = None
    eps: float | None = None
    step: int | None = None
    radius: float | None = None
    images: str | None = None
    n_excluded: int = 0
    excluded: str = ""

    @classmethod
    def of(cls, metric: str, estimate: Estimate, **settings: Any) -> Row:
        """The row of an estimate, under settings of `SETTINGS`, and what it excludes."""
        return cls(metric, *estimate, **settings)

    @property
    def estimate(self) -> Estimate:
        """Value, interval and n."""
        return Estimate(self.value, self.low, self.high, self.n)

    @property
    def setting(self) -> tuple:
        """What tells it from the other rows of its metric."""
        return tuple(getattr(self, name) for name in SETTINGS)


def of_asked(
    rows: Iterable[Row], asked: int, why: str = "could not be read, see there"
) -> Iterator[Row]:
    """Rows that tell how many of the images (or pairs) that were asked for they are without.

    Args:
      rows: over all that have a value.
      asked: how many were asked for.
      why: those that are missing, but for what a row says already, have none, in words.
    """
    for row in rows:
        if missing := max(asked - row.n - row.n_excluded, 0):
            reasons = [row.excluded, f"{missing} of {asked} {why}"]
            excluded = "; ".join(reason for reason in reasons if reason)
            row = dataclasses.replace(row, n_excluded=row.n_excluded + missing, excluded=excluded)
        yield row


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Shown):
    """What a finished job reports; prints as a table.

    Attributes:
      job: name of the job, in `jobs.JOBS`.
      title: what was measured on what, for a person.
      identity: what determines the numbers; JSON values.
      rows: the numbers.
      unreadable: {image name: reason} of the images left out.
      details: what this kind of job adds, JSON values: samples drawn, a probe's history.
      provenance: versions, device and commit, see `runs.provenance`.
      files: {name: SHA-256} of the tables that were written with it.
      values: what the numbers sum up, image by image, for `compare`; kept in the tables, and not in
        `summary.json`: a summary that is read there has none.
      schema: version of the layout.
    """

    job: str
    title: str
    identity: Mapping[str, Any]
    rows: tuple[Row, ...]
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=provenance)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    schema: int = SCHEMA
    values: tuple[Values, ...] = dataclasses.field(default=(), compare=False)

    def write(self, folder: Path) -> None:
        """Writes `summary.json`, atomically, with the hashes of the tables beside it."""
        tables = [path for path in sorted(folder.glob("*.parquet")) if path.stem not in _VARYING]
        whole = dataclasses.replace(self, files={t.name: files.file_hash(t) for t in tables})
        files.write_json(folder / "summary.json", whole._content())

    def damaged_tables(self, folder: Path) -> list[str]:
        """Names of the tables that are not as they were written with this summary."""
        return [
            name
            for name, digest in self.files.items()
            if not (folder / name).exists() or files.file_hash(folder / name) != digest
        ]

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Reads a `summary.json` of this schema or of schema 2.

        Raises:
          UserError: for another file, or another schema; it names the file.
        """
        try:
            content = files.read_json(path)
            schema = content["schema"]
            if schema not in _READABLE:
                raise UserError(
                    f"Expected schema {' or '.join(map(str, _READABLE))}, got {schema}: of another "
                    "version of ur_jax. Run the job again."
                )
            found = cls(**(_from_schema_2(content) if schema == 2 else _rows_of(content)))
            _check_kinds(vars(found), _KINDS_OF_SUMMARY)
            return found
        except DamagedError:
            raise
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no summary of a job ({type(error).__name__}: {error}); repeat the "
                "command that made it."
            ) from error

    @property
    def config(self) -> str:
        """Hash of the identity, but for what other jobs made (a probe's weights)."""
        return files.fingerprint({k: v for k, v in self.identity.items() if k != "requires"})

    def records(self) -> list[dict[str, Any]]:
        """The rows as dicts."""
        return [dataclasses.asdict(row) for row in self.rows]

    def to_arrow(self):
        """The rows as a `pyarrow.Table`."""
        import pyarrow as pa

        names = [field.name for field in dataclasses.fields(Row)]
        return pa.table({name: [getattr(row, name) for row in self.rows] for name in names})

    def to_dataframe(self):
        """The rows as a data frame: pandas', or polars' where only that is installed.

        Raises:
          UserError: if neither is installed; `to_arrow` needs none.
        """
        return shown.to_dataframe(self.to_arrow())

    def to_json(self) -> str:
        """What `summary.json` holds: the numbers and what made them."""
        return files.to_json(self._content())

    def plot(self) -> Figure:
        """The numbers with their intervals, a panel per metric, as matplotlib's figure.

        Raises:
          MissingPackageError: without matplotlib, of the extra `report`.
        """
        from ur_jax.report import results

        return results.plot_summary(self)

    def _content(self) -> dict[str, Any]:
        """What is written of it."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {k: v for k, v in vars(self).items() if k != "values"} | {"rows": rows}

    def __rich__(self):
        """The table, for `rich`."""
        return table(self.title, self.rows)

    def __repr__(self) -> str:
        return f"Summary({self.title!r}, {len(self.rows)} numbers)"


def table(title: str, rows: Iterable[Row], divergence: str = "l2"):
    """Rows of metric, settings, value with 95 % interval, n, and which direction is robust.

    Args:
      title: above the table.
      rows: the numbers.
      divergence: the one to show of several.

    Returns:
      A `rich.table.Table` for 80 columns or more. What was excluded is told below it.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [row for row in rows if row.divergence in (None, divergence)]
    kinds = {name: {getattr(row, name) for row in shown} for name in SETTINGS[1:]}
    used = [name for name, values in kinds.items() if len(values) > 1]
    common = [f"{name} {_short(*values)}" for name, values in kinds.items() if len(values) == 1]
    common = [each for each in common if not each.endswith(" None")]
    found = Table(
        title=Text(", ".join([title, *common])),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    found.add_column("metric", overflow="fold", min_width=12)
    for name in used:
        is_text = name == "images"  # which may be long, as the other settings are not
        found.add_column(
            name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold"
        )
    for name in ("value", "95 % interval", "n"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("robust", no_wrap=True)
    last = None
    for row in shown:
        if last not in (None, row.metric):
            found.add_section()
        last = row.metric
        settings = ["" if (v := getattr(row, name)) is None else _short(v) for name in used]
        ends = f"{_digits(row.low)} to {_digits(row.high)}"
        interval = ends if math.isfinite(row.low + row.high) else ""
        metric = METRICS.get(row.metric)
        n = f"{row.n} of {row.n + row.n_excluded}" if row.n_excluded else str(row.n)
        robust = "" if metric is None else metric.robust
        cells = (row.metric, *settings, _digits(row.value), interval, n, robust)
        found.add_row(*map(Text, cells))
    found.caption = Text("\n".join(exclusions(shown)))
    return found


def exclusions(rows: Iterable[Row]) -> list[str]:
    """Sentences that say which metrics are over fewer images, and why; none where all have all."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.n_excluded:
            reasons.setdefault(row.excluded or "they have no value", {})[row.metric] = None
    return [f"Left out of {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _digits(value: float) -> str:
    """Three decimals; one digit of what is nearer to 0 than those would show."""
    return f"{value:.1g}" if 0 < abs(value) < 0.001 else f"{value:.3f}"


def _short(value: Any) -> str:
    """A setting as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row(content: Mapping[str, Any]) -> Row:
    """A row of JSON, which has null for what is not finite: of a value, the worst there is (an
    abstention, an attack without bound); of an end, that there is none."""
    metric = METRICS.get(content["metric"])
    worst = -math.inf if metric is not None and metric.robust == "high" else math.inf
    number = lambda name, missing: missing if content[name] is None else float(content[name])
    values: dict[str, Any] = {"value": number("value", worst)}
    values |= {name: number(name, math.nan) for name in ("low", "high")}
    names = {field.name for field in dataclasses.fields(Row)}
    found = Row(**{k: v for k, v in content.items() if k in names} | values)
    _check_kinds(vars(found), _KINDS_OF_ROW)
    return found


_Number, _Nothing = (int, float), type(None)
_KINDS_OF_ROW: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("metric", "excluded"), (str,)),
    **dict.fromkeys(("n", "n_excluded"), (int,)),
    **dict.fromkeys(("divergence", "images"), (str, _Nothing)),
    **dict.fromkeys(("eps", "step", "radius"), (*_Number, _Nothing)),
}
_KINDS_OF_SUMMARY: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("job", "title"), (str,)),
    **dict.fromkeys(("identity", "unreadable", "details", "provenance", "files"), (dict,)),
}


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Raises TypeError for a value of another kind than was written."""
    for name, allowed in kinds.items():
        if not isinstance(values[name], allowed) or isinstance(values[name], bool):
            raise TypeError(f"{name} is {values[name]!r}"[:80])


def _rows_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a summary of this schema."""
    return {**content, "rows": tuple(_row(row) for row in content["rows"])}


_JOBS_OF_SCHEMA_2 = {
    "protocol": "evaluate",
    "method": "certify",
    "views": "probe",
    "groups": "impersonate",
}
"""The jobs of then, by a setting that only theirs had."""


def _from_schema_2(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a summary as schema 2 had them: its job was not named."""
    known = ("schema", "commit", "versions", "device", "matmul_precision")
    unreadable = content.get("unreadable", {})
    if isinstance(unreadable, list):
        unreadable = dict.fromkeys(unreadable, "")
    config = {k: v for k, v in content["config"].items() if k != "probe"}  # where it lay
    job = next((job for name, job in _JOBS_OF_SCHEMA_2.items() if name in config), "")
    return {
        "job": job,
        "title": f"{job}: {config.get('encoder', '')} on {config.get('images', '')}",
        "identity": config,
        "rows": tuple(_row(row) for row in content["metrics"]),
        "unreadable": unreadable,
        "details": {
            k: v for k, v in content.items() if k not in (*known, "config", "metrics", "unreadable")
        },
        "provenance": {k: content[k] for k in known[1:] if k in content},
        "schema": 2,
    }
