"""Figures that only their maker knows of: no state of matplotlib's changes, no backend is set."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ur_jax.errors import require
from ur_jax.runs import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(
    num_rows: int, num_columns: int, size: tuple[float, float], **shared: bool
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes.

    Args:
      num_rows, num_columns: of axes.
      size: width and height in inches.
      **shared: `sharex` and `sharey`, of the axes.

    Returns:
      The figure and its axes (num_rows, num_columns).

    Raises:
      MissingPackageError: without matplotlib, of the extra `report`.
    """
    figure = _matplotlib("figure").Figure(figsize=size, layout="constrained")
    _matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, squeeze=False, **shared)


@contextlib.contextmanager
def styled(style: Mapping[str, Any]) -> Iterator[None]:
    """Draws in a style for as long as the block lasts.

    Args:
      style: of matplotlib's settings, those that differ.
    """
    with _matplotlib().rc_context(dict(style)):
        yield


def in_notebook(figure: Figure) -> Figure:
    """The figure, which a notebook shows where it is a cell's last value."""

    def png() -> bytes:
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=110, facecolor="white")
            return file.getvalue()

    figure._repr_png_ = png  # pyright: ignore[reportAttributeAccessIssue]
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _matplotlib(module: str = "") -> Any:
    """Matplotlib, or a module of it."""
    return require(f"matplotlib.{module}".rstrip("."), "report", "Drawing figures")
