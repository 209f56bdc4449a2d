"""What a person sees of a run: the table on the terminal, and plots as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ur_jax.certify import certified_accuracy
from ur_jax.performance import suite as throughput
from ur_jax.runs import atomic_path
from ur_jax.stats.intervals import Estimate

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)

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
    figure, axes = plt.subplots(
        1, len(radii), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
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
    _save(figure, path)


def plot_margins(path: Path, pairs: dict[str, np.ndarray], divergence: str = "l2") -> None:
    """Distribution of the margin ratio over pairs; below 0 the attacked images overlap.

    Args:
      path: PNG to write.
      pairs: columns of `pairs.parquet`.
      divergence: which margin.
    """
    margins = pairs[f"margin_{divergence}"]
    margins = margins[np.isfinite(margins)]
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    axis.hist(margins, bins=min(50, max(10, len(margins) // 4)), color="#475569")
    axis.axvline(0.0, color="#c2410c", linewidth=1.5)
    risk = np.mean(margins < 0)
    axis.set(
        title=f"overlap risk {risk:.3f} of {len(margins)} pairs",
        xlabel=f"margin ratio ({divergence}); left of 0 is overlap",
        ylabel="pairs",
    )
    _save(figure, path)


def plot_gallery(
    path: Path,
    images: np.ndarray,
    attacked: np.ndarray,
    neighbours: np.ndarray,
    is_own: np.ndarray,
) -> None:
    """Image, perturbation, attacked image and the clean images nearest to the attacked one.

    Args:
      path: PNG to write.
      images: originals (S,H,W,3) in [0,1].
      attacked: attacked images, the same shape.
      neighbours: clean images (S,K,H,W,3), nearest first.
      is_own: (S,K) bool, where a neighbour is the image itself.
    """
    num_rows, num_neighbours = neighbours.shape[:2]
    figure, axes = plt.subplots(
        num_rows,
        3 + num_neighbours,
        figsize=(1.3 * (3 + num_neighbours), 1.4 * num_rows),
        squeeze=False,
        layout="constrained",
    )
    delta = attacked - images
    scale = 0.5 / max(float(np.abs(delta).max()), 1e-12)
    for row, cells in enumerate(axes):
        shown = (images[row], 0.5 + scale * delta[row], attacked[row], *neighbours[row])
        for axis, picture in zip(cells, shown):
            axis.imshow(np.clip(picture, 0.0, 1.0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        for axis in cells[3:][is_own[row]]:
            for side in axis.spines.values():
                side.set(color="#15803d", linewidth=3)
    titles = ["image", f"perturbation\n(times {scale:.0f})", "attacked"]
    titles += [f"neighbour {k + 1}" for k in range(num_neighbours)]
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=8)
    figure.supxlabel("green frame: the image itself", fontsize=8)
    _save(figure, path)


def plot_views(path: Path, clean: np.ndarray, attacked: np.ndarray | None) -> None:
    """Training views, and below them the same attacked and the perturbations.

    Args:
      path: PNG to write.
      clean: views (S,H,W,3) in [0,1].
      attacked: the same attacked; None without attack.
    """
    rows = {"view": clean}
    if attacked is not None:
        delta = attacked - clean
        scale = 0.5 / max(float(np.abs(delta).max()), 1e-12)
        rows |= {"attacked": attacked, f"perturbation\n(times {scale:.0f})": 0.5 + scale * delta}
    figure, axes = plt.subplots(
        len(rows),
        len(clean),
        figsize=(1.3 * len(clean), 1.4 * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for cells, (name, pictures) in zip(axes, rows.items()):
        for axis, picture in zip(cells, pictures):
            axis.imshow(np.clip(picture, 0.0, 1.0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        cells[0].set_ylabel(name, fontsize=8)
    _save(figure, path)


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
    figure, axes = plt.subplots(
        num_rows,
        2 + num_reads,
        figsize=(1.2 * (2 + num_reads), 1.3 * num_rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, cells in enumerate(axes):
        for axis, picture in zip(cells, (images[row], targets[row], *attacked[row])):
            axis.imshow(np.clip(picture, 0.0, 1.0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        for axis in cells[2:][success[row]]:
            for side in axis.spines.values():
                side.set(color="#c2410c", linewidth=3)
    for axis, title in zip(axes[0], ("image", "target", *(f"step {step}" for step in steps))):
        axis.set_title(title, fontsize=8)
    figure.supxlabel("orange frame: passes for the target's group", fontsize=8)
    _save(figure, path)


def plot_radii(path: Path, certificates: dict[str, np.ndarray]) -> None:
    """Certified accuracy (or, without labels, fraction certified) against the radius.

    Args:
      path: PNG to write.
      certificates: columns of `certificates.parquet` of randomized smoothing.
    """
    radius, label = certificates["radius"], certificates["label"]
    correct, name = ~certificates["abstained"], "fraction certified"
    if (label >= 0).all():
        correct = correct & (certificates["predicted"] == label)
        name = "certified accuracy"
    grid = np.linspace(0.0, max(float(radius.max()) * 1.05, 1e-3), 400)
    curve = certified_accuracy(radius, correct, grid)
    _plot_fractions(path, [(grid, curve, "l2 radius (pixel units)")], name)


def plot_eps_out(path: Path, certificates: dict[str, np.ndarray]) -> None:
    """Fraction certified against eps_out, as a quantile of clean distances and normalised.

    Args:
      path: PNG to write.
      certificates: columns of `certificates.parquet` of center smoothing.
    """
    panels = []
    for name, label in (
        ("quantile", "eps_out as a quantile of clean distances"),
        ("normalised", "eps_out / median clean distance"),
    ):
        values = np.where(certificates["abstained"], np.inf, certificates[name])
        top = 1.0 if name == "quantile" else 1.05 * values[np.isfinite(values)].max(initial=1e-3)
        grid = np.linspace(0.0, top, 400)
        panels.append((grid, (values[:, None] <= grid).mean(axis=0), label))
    _plot_fractions(path, panels, "fraction certified")


def _plot_fractions(path: Path, panels: Sequence[tuple], name: str) -> None:
    """Fractions `name` of images as steps: panels of (x, fraction, label of x)."""
    size = (4.8 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (x, fraction, label) in zip(axes[0], panels):
        axis.step(x, fraction, where="post", color="#1d4ed8")
        axis.set(xlabel=label, ylim=(-0.02, 1.02))
    axes[0, 0].set_ylabel(name)
    _save(figure, path)


def encoder_table(measures: Mapping[str, Mapping[str, Estimate]], encoders: Sequence[str]) -> Table:
    """A row per measure, a column per encoder: value and 95 % interval, as Markdown.

    Args:
      measures: {measure: {encoder: estimate}}; a missing one stays empty.
      encoders: the columns.
    """
    table = Table(box=box.MARKDOWN)
    table.add_column("measure", no_wrap=True)
    for encoder in encoders:
        table.add_column(encoder, no_wrap=True)
    for measure, estimates in measures.items():
        shown = [_interval(estimates[e]) if e in estimates else "" for e in encoders]
        table.add_row(measure, *shown)
    return table


def as_markdown(table: Table) -> str:
    """The text of a table whose box is Markdown."""
    with io.StringIO() as file:
        Console(file=file, width=1000).print(table)
        return "\n".join(line.rstrip() for line in file.getvalue().strip().splitlines()) + "\n"


def _interval(estimate: Estimate) -> str:
    """Value and interval in short."""
    value, low, high, _ = estimate
    if value is None:
        return "infinite"
    if low is None or high is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _save(figure, path: Path) -> None:
    """Writes a figure as PNG, atomically, and closes it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def throughput_table(title: str, results: Sequence[throughput.Result]) -> Table:
    """Rows of what was measured, by whom, at which rate, and ours over it.

    Args:
      title: above the table.
      results: of `ur_jax.performance.run`.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("work", "with", "by"):
        table.add_column(column)
    for column in ("rate", "ours over it", "of peak flops", "of peak copy"):
        table.add_column(column, justify="right")
    for result in results:
        cells = throughput.cells(result)
        size = f"{result.encoder} {result.dtype} {result.batch_size}"
        rate = f"{result.rate:.4g} {result.unit}"
        table.add_row(result.work, size, result.implementation, rate, cells[7], *cells[11:13])
    return table


def plot_throughput(path: Path, results: Sequence[throughput.Result]) -> None:
    """Bars of every rate with its spread, on a logarithmic scale; writes a PNG.

    Args:
      path: the file.
      results: of `ur_jax.performance.run`.
    """
    labels = [
        f"{r.work}, {r.encoder}, {r.dtype}, batch {r.batch_size}\n{r.implementation}, {r.unit}"
        for r in results
    ]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(results)), layout="constrained")
    places, rates = np.arange(len(results)), np.array([r.rate for r in results])
    spread = np.abs([[r.low for r in results], [r.high for r in results]] - rates)
    colors = ["#1d4ed8" if r.implementation == "ur_jax" else "#9ca3af" for r in results]
    bars = axes.barh(places, rates, xerr=spread, color=colors)
    axes.bar_label(bars, [f" {rate:.3g}" for rate in rates])
    axes.set(xscale="log", yticks=places, yticklabels=labels, xlabel="rate, in each bar's unit")
    axes.invert_yaxis()
    _save(figure, path)
