"""Plots of one run, each a PNG beside its tables. They need the extra `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ur_jax.report.canvas import new_figure, save_png
from ur_jax.report.terminal import Measured

_COLORS = {"untargeted": "#c2410c", "targeted": "#1d4ed8"}


def plot_distances(path: Path, attacks: dict[str, np.ndarray], divergence: str = "l2") -> None:
    """Distance against attack step, a panel per eps: median and the central 50 % and 90 %.

    Args:
      path: PNG to write.
      attacks: columns of `attacks.parquet`.
      divergence: which distance.
    """
    radii = np.unique(attacks["eps"])
    size = (5 * len(radii), 3.6)
    figure, axes = new_figure(1, len(radii), size, sharey=True)
    for axis, eps in zip(axes[0], radii):
        for mode, color in _COLORS.items():
            rows = (attacks["eps"] == eps) & (attacks["mode"] == mode)
            steps = attacks["step"][rows]
            num_steps = steps.max() + 1
            order = np.lexsort((steps, attacks["image"][rows]))
            distances = attacks[f"dist_{divergence}"][rows][order].reshape(-1, num_steps)
            q = np.quantile(distances, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
            x = np.arange(num_steps)
            label = "to the clean image" if mode == "untargeted" else "to the target"
            axis.fill_between(x, q[0], q[4], color=color, alpha=0.12, linewidth=0)
            axis.fill_between(x, q[1], q[3], color=color, alpha=0.25, linewidth=0)
            axis.plot(x, q[2], color=color, label=f"{mode}: {label}")
        axis.set(title=f"eps {eps:g}", xlabel="attack step")
    axes[0, 0].set_ylabel(f"{divergence} distance of representations")
    axes[0, 0].legend(frameon=False, fontsize=8)
    save_png(figure, path)


def plot_margins(path: Path, pairs: dict[str, np.ndarray], divergence: str = "l2") -> None:
    """Distribution of the margin ratio over pairs; below 0 the attacked images overlap.

    Args:
      path: PNG to write.
      pairs: columns of `pairs.parquet`.
      divergence: which margin.
    """
    margins = pairs[f"margin_{divergence}"]
    margins = margins[np.isfinite(margins)]
    figure, [[axis]] = new_figure(1, 1, (5, 3.6))
    axis.hist(margins, bins=min(50, max(10, len(margins) // 4)), color="#475569")
    axis.axvline(0.0, color="#c2410c", linewidth=1.5)
    risk = np.mean(margins < 0) if len(margins) else np.nan
    axis.set(
        title=f"overlap risk {risk:.3f} of {len(margins)} pairs",
        xlabel=f"margin ratio ({divergence}); left of 0 is overlap",
        ylabel="pairs",
    )
    save_png(figure, path)


def plot_gallery(
    path: Path,
    images: np.ndarray,
    attacked: np.ndarray,
    neighbours: np.ndarray,
    indices: np.ndarray,
    own: np.ndarray,
) -> None:
    """Each image and the clean images nearest to it, and below it the same attacked.

    Args:
      path: PNG to write.
      images: originals (S,H,W,3) in [0,1].
      attacked: attacked images, the same shape.
      neighbours: clean images (S,2,K,H,W,3), nearest first, of the image and of the attacked one.
      indices: (S,2,K) which images they are.
      own: (S,) which the image itself is.
    """
    num_images, _, num_neighbours = indices.shape
    if not num_images:  # none of them could be read
        return
    delta = attacked - images
    scale = 0.5 / max(float(np.abs(delta).max()), 1e-12)
    blank = np.ones_like(images[0])
    rows = []
    for image, change, moved, (before, after) in zip(images, delta, attacked, neighbours):
        rows += [(image, blank, *before), (moved, 0.5 + scale * change, *after)]
    figure, axes = _show(rows, (2 + num_neighbours, 1.02 * len(rows) + 0.5))
    for axis in axes[::2, 1]:
        axis.set_axis_off()
    for axis, name in zip(axes[:, 0], ("image", "attacked") * num_images):
        axis.set_ylabel(name, fontsize=8)
    titles = ["", f"perturbation\n(times {scale:.0f})"]
    titles += [f"neighbour {k + 1}" for k in range(num_neighbours)]
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=8)
    is_own = indices == own[:, None, None]
    stayed = (indices[:, 1, :, None] == indices[:, 0, None, :]).any(2) & ~is_own[:, 1]
    _frame(axes[:, 2:][is_own.reshape(len(rows), -1)], "#15803d")
    _frame(axes[1::2, 2:][stayed], "#1d4ed8", (0, (1.5, 1.5)))
    figure.supxlabel(
        "Neighbours: the nearest clean images. Whole green frame: the image itself.\n"
        "Dashed blue frame: one that is among them before the attack, too.",
        fontsize=8,
    )
    save_png(figure, path)


def plot_views(path: Path, clean: np.ndarray, attacked: np.ndarray | None) -> None:
    """Training views, and below them the same attacked and the perturbations.

    Args:
      path: PNG to write.
      clean: views (S,H,W,3) in [0,1].
      attacked: the same attacked; None without attack.
    """
    rows: dict[str, Any] = {"view": clean}
    if attacked is not None:
        delta = attacked - clean
        scale = 0.5 / max(float(np.abs(delta).max()), 1e-12)
        rows |= {"attacked": attacked, f"perturbation\n(times {scale:.0f})": 0.5 + scale * delta}
    figure, axes = _show(list(rows.values()), (1.3 * len(clean), 1.4 * len(rows)))
    for cells, name in zip(axes, rows):
        cells[0].set_ylabel(name, fontsize=8)
    save_png(figure, path)


def plot_impersonation(
    path: Path,
    images: np.ndarray,
    targets: np.ndarray,
    attacked: np.ndarray,
    success: np.ndarray,
    steps: Sequence[int],
) -> None:
    """Image, target, and the attacked image at each reading, framed where it passes for the target.

    Args:
      path: PNG to write.
      images: originals (S,H,W,3) in [0,1].
      targets: the images whose representations they are attacked towards, the same shape.
      attacked: attacked images (S,R,H,W,3).
      success: (S,R) bool, where the probe puts the attacked image into the target's group.
      steps: the R steps.
    """
    num_rows, num_reads = success.shape
    if not num_rows:  # none of them could be read
        return
    rows = [(images[row], targets[row], *attacked[row]) for row in range(num_rows)]
    figure, axes = _show(rows, (1.2 * (2 + num_reads), 1.3 * num_rows + 0.5))
    _frame(axes[:, 2:][success], "#c2410c")
    for axis, title in zip(axes[0], ("image", "target", *(f"step {step}" for step in steps))):
        axis.set_title(title, fontsize=8)
    figure.supxlabel("orange frame: passes for the target's group", fontsize=8)
    save_png(figure, path)


def plot_fractions(path: Path, panels: Sequence[tuple], name: str) -> None:
    """Shares of images as step functions, a panel each.

    Args:
      path: PNG to write.
      panels: (x, share, label of x) each.
      name: what the share is of, for the axis.
    """
    size = (4.8 * len(panels), 3.6)
    figure, axes = new_figure(1, len(panels), size)
    for axis, (x, fraction, label) in zip(axes[0], panels):
        axis.step(x, fraction, where="post", color="#1d4ed8")
        axis.set(xlabel=label, ylim=(-0.02, 1.02))
    axes[0, 0].set_ylabel(name)
    save_png(figure, path)


def plot_throughput(path: Path, results: Sequence[Measured]) -> None:
    """Bars of every rate with its spread, on a logarithmic scale; writes a PNG.

    Args:
      path: the file.
      results: of `ur_jax.performance.run`.
    """
    labels = [
        f"{r.work}, {r.encoder}, {r.dtype}, batch {r.batch_size}\n{r.implementation}, {r.unit}"
        for r in results
    ]
    figure, [[axes]] = new_figure(1, 1, (9, 1.2 + 0.5 * len(results)))
    places, rates = np.arange(len(results)), np.array([r.rate for r in results])
    spread = np.abs([[r.low for r in results], [r.high for r in results]] - rates)
    colors = ["#1d4ed8" if r.implementation == "ur_jax" else "#9ca3af" for r in results]
    bars = axes.barh(places, rates, xerr=spread, color=colors)
    axes.bar_label(bars, [f" {rate:.3g}" for rate in rates])
    axes.set(xscale="log", yticks=places, yticklabels=labels, xlabel="rate, in each bar's unit")
    axes.invert_yaxis()
    save_png(figure, path)


def _show(rows: Sequence[Sequence[Any]], size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure with rows of pictures (H,W,3) in [0,1], and its axes."""
    figure, axes = new_figure(len(rows), len(rows[0]), size)
    for cells, pictures in zip(axes, rows):
        for axis, picture in zip(cells, pictures):
            axis.imshow(np.clip(picture, 0.0, 1.0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    return figure, axes


def _frame(axes: Sequence[Any], color: str, line: Any = "-") -> None:
    """Puts a frame around pictures."""
    for axis in axes:
        for side in axis.spines.values():
            side.set(color=color, linewidth=3, linestyle=line, capstyle="butt")
