"""The report of a working directory: one HTML file that opens anywhere, and all numbers as CSV.

    python experiments/report.py runs/cifar

Reads what `benchmark.py` (or single scripts with --out WORKDIR/ENCODER/STAGE) left there and writes
`report.html`, which needs no network and no other file, `RESULTS.csv`, and each figure as PNG and
PDF in `figures/`. Nothing is computed anew, so that it may run while the benchmark does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import command
import jax
import tyro

from ur_jax import runs
from ur_jax.report import collect as results
from ur_jax.report import compare, figures, page
from ur_jax.runs import plan

_CONTENTS = {
    "labels-free": "Without labels",
    "labels": "With labels",
    "curves": "Curves",
    "pictures": "Pictures",
    "correlation": "Do they agree?",
    "missing": "Missing",
    "numbers": "All numbers",
    "origin": "Where the numbers come from",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which results."""

    workdir: Annotated[Path, tyro.conf.Positional]
    """Working directory of `benchmark.py`."""


def main(config: Config) -> None:
    found = results.collect(config.workdir)
    results.write_csv(config.workdir / "RESULTS.csv", found.rows)
    body = page.render(f"Robustness without labels: {config.workdir.name}", parts(config, found))
    with runs.atomic_path(config.workdir / "report.html") as temporary:
        temporary.write_text(body, encoding="utf-8")
    command.console.print(
        f"{len(found.rows)} numbers of {len(found.summaries)} stages: "
        f"{config.workdir / 'report.html'}, {config.workdir / 'RESULTS.csv'}",
        highlight=False,
        soft_wrap=True,
    )


def parts(config: Config, found: results.Results) -> Iterator[str]:
    """The page's markup, part by part."""
    planned = read_plan(config.workdir)
    encoders = sorted({encoder for encoder, _ in found.summaries} | set(planned))
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in _CONTENTS.items())
    yield (
        "<header><h1>How easily do representations move?</h1>"
        + page.paragraph(
            f"{len(encoders)} encoders, {len(found.summaries)} finished stages, "
            f"{len(found.rows)} numbers. Every attack is measured in pixel units of [0,1]; every "
            "interval is at 95 %, over images. All numbers are in RESULTS.csv."
        )
        + f"<nav>{links}</nav></header>"
    )
    legend = page.paragraph(
        "A value is marked as best where its whole interval lies beyond every other encoder's; "
        "where none is marked, the intervals do not tell which is best. Click a heading to sort. "
        "Distances are l2; the other divergences are under “All numbers”.",
        "soft",
    )
    for name, labels in (("labels-free", False), ("labels", True)):
        columns = compare.columns(found.rows, labels=labels)
        table = page.comparison_table(encoders, columns) if columns else nothing()
        yield page.section(_CONTENTS[name], name, legend if not labels else "", table)
    yield page.section(_CONTENTS["curves"], "curves", *curves(config.workdir, found, encoders))
    yield page.section(_CONTENTS["pictures"], "pictures", *pictures(config.workdir, encoders))
    yield page.section(_CONTENTS["correlation"], "correlation", *correlation(found))
    yield page.section(_CONTENTS["missing"], "missing", *missing(config.workdir, found, planned))
    yield page.section(_CONTENTS["numbers"], "numbers", *numbers(found))
    yield page.section(_CONTENTS["origin"], "origin", *origin(config.workdir, found))


def read_plan(workdir: Path) -> dict[str, dict[str, Any]]:
    """{encoder: its command, and stages with what they lack} that `benchmark.py` planned."""
    return {path.parent.name: runs.read_json(path) for path in workdir.glob("*/plan.json")}


def nothing() -> str:
    """What stands where there is nothing yet."""
    return page.paragraph("Nothing is finished yet.", "soft")


def curves(workdir: Path, found: results.Results, encoders: list[str]) -> Iterator[str]:
    """All figures; each is also written as PNG and PDF."""
    summaries = found.summaries

    def show(name: str, figure, caption: str) -> str:
        figures.save(figure, workdir / "figures" / name)
        files = f"figures/{name}.png, figures/{name}.pdf"
        return page.figure(figures.to_svg(figure), caption, files)

    drawn = False
    for eps in compare.attack_radii(found.rows):
        by_mode = compare.attack_curves(workdir, summaries, eps)
        if any(by_mode.values()):
            drawn = True
            yield show(
                f"distance-eps-{eps:g}",
                figures.distance_figure(by_mode, eps, encoders),
                "Median over images, with its interval. Untargeted: robust is low; at 1 the image "
                "has moved as far as two unrelated images are apart. Targeted: robust is high.",
            )
    margins = compare.margins(workdir, summaries)
    if margins:
        drawn = True
        yield show(
            "margin-ratio",
            figures.margin_figure(margins),
            "Pairs of images, each attacked towards the other. Below 0 the attacked images have "
            "passed each other.",
        )
    accuracy = compare.accuracy_curves(workdir, summaries)
    if accuracy:
        drawn = True
        yield show(
            "certified-accuracy",
            figures.step_figure(
                [("l2 radius, pixel units", accuracy)], "certified accuracy", encoders
            ),
            "Share of images that the smoothed probe classifies correctly within the radius; each "
            "certificate fails with probability alpha at most.",
        )
    panels = [
        (label, compare.divergence_curves(workdir, summaries, column))
        for column, label in (
            ("quantile", "certified divergence, quantile of clean distances"),
            ("normalised", "certified divergence / median clean distance"),
        )
    ]
    if any(by_encoder for _, by_encoder in panels):
        drawn = True
        yield show(
            "certified-divergence",
            figures.step_figure(panels, "share of images", encoders),
            "Share of images whose smoothed representation provably moves by at most this much. "
            "Robust is a curve that rises early; images without a certificate never count.",
        )
    if not drawn:
        yield nothing()


def pictures(workdir: Path, encoders: list[str]) -> Iterator[str]:
    """Galleries of neighbours and impersonations, an encoder at a time."""
    shown = False
    for encoder in encoders:
        found = []
        for path, caption in (
            (
                workdir / encoder / "breakaway" / "gallery.png",
                "Images, their perturbations, and the clean images nearest to the attacked ones.",
            ),
            (
                workdir / encoder / "impersonation" / "impersonations.png",
                "Images attacked towards the representation of the target.",
            ),
        ):
            if path.exists():
                found.append(page.figure(page.picture(path, f"{encoder}: {caption}"), caption))
        if found:
            yield page.fold(encoder, *found, is_open=not shown)
            shown = True
    if not shown:
        yield nothing()


def correlation(found: results.Results) -> Iterator[str]:
    """Rank correlation between measures without and with labels."""
    pairs = list(compare.correlations(found.rows))
    if all(correlation is None for _, _, correlation, _ in pairs):
        yield page.paragraph(
            "A rank correlation needs at least 3 encoders with both a measure without labels and "
            "one with labels.",
            "soft",
        )
        return
    yield page.paragraph(
        "Spearman's rank correlation over encoders between each measure without labels (rows) and "
        "with labels (columns), with Kendall's tau, its p-value (exact for few encoders, not "
        "corrected for the many pairs) and the number of encoders. The sign is that of the values: "
        "where one is robust when low and the other good when high, agreement is negative.",
        "soft",
    )
    yield page.correlation_table(pairs)


def missing(
    workdir: Path, found: results.Results, planned: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """Stages that were planned and have no result, with the command that fills them."""
    damaged = dict(found.damaged)
    complete = True
    for encoder, known in sorted(planned.items()):
        rows = []
        for stage, reason in known["stages"].items():
            if (encoder, stage) in found.summaries:
                continue
            record = plan.read_record(workdir / encoder / stage)
            reason = damaged.pop((encoder, stage), reason)
            if not reason and record.get("error"):
                reason = record["error"].strip().splitlines()[-1]
            state = "failed" if record.get("error") else "begun" if record else "not begun"
            rows.append((stage, state, reason))
        if rows:
            complete = False
            columns = dict(zip(("stage", "state", "why"), zip(*rows)))
            yield f"<h3>{page.escape(encoder)}</h3>" + page.code(known["command"])
            yield page.plain_table(columns, text=tuple(columns))
    for (encoder, stage), reason in damaged.items():
        complete = False
        yield page.paragraph(f"{encoder}/{stage} cannot be read: {reason}", "bad")
    if complete:
        yield page.paragraph(
            "Nothing: every planned stage is finished."
            if planned
            else "Not known: there is no plan.json, which benchmark.py writes."
        )


def numbers(found: results.Results) -> Iterator[str]:
    """Every number, in a table that can be filtered."""
    if not found.rows:
        yield nothing()
        return
    names = [name for name in results.COLUMNS if name not in ("schema", "weights")]
    columns = {name: [row[name] for row in found.rows] for name in names}
    text = ("encoder", "stage", "metric", "divergence", "images", "config")
    yield page.plain_table(columns, identifier="all-numbers", text=text)


def origin(workdir: Path, found: results.Results) -> Iterator[str]:
    """Run time, hardware, versions and configuration of each stage."""
    if not found.summaries:
        yield nothing()
        return
    rows = []
    for (encoder, stage), summary in found.summaries.items():
        record = plan.read_record(workdir / encoder / stage)
        rows.append(
            {
                "stage": f"{encoder}/{stage}",
                "config": results.fingerprint(summary),
                "seconds": record.get("seconds"),
                "sessions": record.get("sessions"),
                "hosts": record.get("hosts"),
                "device": summary["device"],
                "precision": summary["matmul_precision"],
                "versions": ", ".join(f"{k} {v}" for k, v in summary["versions"].items()),
                "commit": summary["commit"],
            }
        )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    yield page.paragraph(
        "Seconds are those of the last session; with more than one session the stage was "
        "interrupted and took longer in all. The hash of the configuration is the one in the "
        "table of all numbers.",
        "soft",
    )
    text = ("stage", "config", "device", "precision", "versions", "commit")
    yield page.plain_table(columns, identifier="all-stages", text=text)
    configurations = []
    for (encoder, stage), summary in found.summaries.items():
        text = json.dumps(summary["config"], indent=1)
        configurations.append(page.fold(f"{encoder}/{stage}", page.code(text)))
    yield page.fold("Configuration of each stage", *configurations)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # no accelerator, nor the other hosts of a pod
    command.run(main, Config)
