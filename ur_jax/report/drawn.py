"""What the page draws: curves of all encoders, pictures, and how measures agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import UnidentifiedImageError

from ur_jax.report import agreement, compare, figures, page
from ur_jax.report.collect import Results
from ur_jax.report.page import Block

_PICTURES = {
    "gallery.png": "Images and the same attacked, their perturbations, and the nearest clean "
    "images.",
    "impersonations.png": "Images attacked towards the representation of the target.",
}
"""Files of a stage that the page shows, with their captions."""

_FROM = {
    "targeted": "distance to a target against the attack's step: evaluate --stages attacks",
    "untargeted": "distance moved against the attack's step: the same, and distances for its unit",
    "strongest found": "the strongest attack beside it: evaluate --stages strongest, distances",
    "certified-accuracy": "certified accuracy: certify with a probe and labels",
    "certified-cosine": "certified cosine: certify --method cosine",
}
"""What the page would draw, and of what; by how a figure's, panel's or series' name begins."""


def curves(
    found: Results, encoders: Sequence[str], folder: Path, problems: list[str]
) -> Iterator[Block]:
    """All figures of curves; each is also written as PNG and PDF.

    Args:
      found: what is in a working directory.
      encoders: all of them.
      folder: where the files go.
      problems: a line is added for each stage that could not be drawn.
    """
    gathered, new = figures.gather(found)
    problems.extend(new)
    if not gathered:
        return
    yield page.Paragraph(
        "On a screen, values are told under the pointer, where a finger taps, and with the arrow "
        "keys in a figure that the tab key has reached; the boxes switch encoders off.",
        "soft screen",
    )
    yield page.Paragraph(
        "An encoder has the same colour, line and marker in all figures of curves.", "soft"
    )
    for name, panels in gathered.items():
        figure = figures.draw(panels, encoders)
        svg = figures.to_svg(figure)  # first: it lays the figure out
        data = figures.data_of(figure, panels, encoders)
        captions = dict.fromkeys(c.caption for by_name in panels.values() for c in by_name.values())
        yield page.Figure(" ".join(captions), svg, data, files=_save(figure, folder / name))
    if reasons := _not_drawn(gathered):
        text = f"Not drawn, as no encoder has a finished stage for it: {'; '.join(reasons)}."
        yield page.Paragraph(text, "soft")


def _not_drawn(gathered: Mapping[str, figures.Panels]) -> list[str]:
    """What there is no curve of, and which stage would have it."""
    names = [*gathered]
    for panels in gathered.values():
        names += panels
        names += [curve.series for by_name in panels.values() for curve in by_name.values()]
    return [
        text for start, text in _FROM.items() if not any(name.startswith(start) for name in names)
    ]


def _save(figure, path: Path) -> str:
    """Writes a figure's files; returns what the page says of them."""
    figures.save(figure, path)
    return f"figures/{path.name}.png, figures/{path.name}.pdf"


def pictures(found: Results, workdir: Path, problems: list[str]) -> Iterator[Block]:
    """Galleries of neighbours and impersonations, by encoder; `problems` as of `curves`."""
    by_encoder: dict[str, list[Block]] = {}
    for encoder, stage in found.summaries:
        for name, caption in _PICTURES.items():
            path = workdir / encoder / stage / name
            if not path.exists():
                continue
            try:
                shown = page.picture(path, f"{encoder}: {caption}")
            except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
                problems.append(f"{path} cannot be shown: {error}")
                continue
            by_encoder.setdefault(encoder, []).append(page.Figure(caption, picture=shown))
    for place, (encoder, blocks) in enumerate(by_encoder.items()):
        yield page.Fold(encoder, blocks, is_open=place == 0)


def correlation(found: Results, folder: Path) -> Iterator[Block]:
    """Rank correlation between measures without and with labels; its figure goes to `folder`."""
    pairs = list(compare.correlations(found.numbers))
    if all(correlation is None for _, _, correlation, _ in pairs):
        yield page.Paragraph(
            "A rank correlation needs at least 3 encoders with both a measure without labels and "
            "one with labels.",
            "soft",
        )
        return
    with_probes = agreement.with_probes(pairs)
    if with_probes is None:
        yield page.Paragraph("Without a figure: fewer than 3 encoders have a probe.", "soft")
    else:
        figure = agreement.draw(with_probes)
        svg = figures.to_svg(figure)
        data = agreement.data_of(figure, with_probes)
        files = _save(figure, folder / agreement.NAME)
        yield page.Figure(agreement.CAPTION, svg, data, files=files)
    yield page.Paragraph(
        "Spearman's rank correlation over encoders between each measure without labels (rows) and "
        "with labels (columns), with Kendall's tau, its p-value (exact for few encoders, not "
        "corrected for the many pairs) and the number of encoders. The sign is that of the values: "
        "where one is robust when low and the other good when high, agreement is negative.",
        "soft",
    )
    yield page.correlation_table(pairs)
