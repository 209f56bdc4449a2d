"""Certificates of one encoder on many images, as a batch job that can be killed at any moment.

    python experiments/certify.py --encoder demo --images demo --method center --out runs/center
    python experiments/certify.py --encoder demo --images folder:photos --method randomized \
        --probe runs/noisy_probe --out runs/randomized

Center smoothing bounds how far the smoothed representation moves; randomized smoothing certifies
the class of a probe. `--probe nearest` needs no labels: the classes are the images themselves, and
a noisy image counts for the one whose clean representation is nearest (l2). What is certified then
is that the smoothed encoder still tells an image from all others.

Writes to --out: `certificates.parquet` (one row per image: the certificate and the raw counts it
follows from), `times.parquet` (seconds per image: the only file that differs between runs),
`summary.json` (with 95 % intervals) and the curve as `curves.png`. Finished images are written
every few seconds and skipped when the same command is started again; the table is the same, byte
for byte. On several hosts start the same command on each: images are divided over the hosts, the
samples of an image over each host's devices.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import command
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from rich.table import Table

import ur_jax
from ur_jax import checkpoints, data, intervals, metrics, records, sharding
from ur_jax.certify import (
    CenterConfig,
    Classifier,
    RandomizedConfig,
    center_smoothing,
    certified_accuracy,
    certified_radius,
    check_labels,
    fit_batch_size,
    lower_bound,
    nearest_image_classifier,
    randomized_smoothing,
)
from ur_jax.encoders import Encoder

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of backend)

RADII = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Radii of the printed certified accuracy: the paper's, and 0.5."""

_FLUSH_SECONDS = 5.0
_LOAD_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoder, which images, which certificate, where to."""

    encoder: str = tyro.MISSING
    """Checkpoint directory, published file (with --name), or an encoder that ships: demo."""
    images: str = tyro.MISSING
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    out: Path = tyro.MISSING
    """Folder of the results; a run that stopped there goes on."""
    method: Literal["center", "randomized"] = "center"
    preset: str = "adaptive"
    """adaptive, quick (the same, smaller) or paper (fixed numbers of samples, spec section 4)."""
    num_images: int = 200
    """Evenly spaced subset of the images."""
    seed: int = 0
    name: str | None = None
    """Which encoder a published file holds."""
    representation: str = "paper"
    """paper, backbone, projection or another output of the network."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    probe: str | None = None
    """Of randomized: checkpoint directory of a linear probe, or nearest."""
    batch_size: int | None = None
    """Samples per device and forward pass; by default from the device's memory."""
    num_distribution: int = 100_000
    """Of center: clean images, at most, of the distance distribution F."""
    center: CenterConfig = CenterConfig(bound="union")
    randomized: RandomizedConfig = RandomizedConfig(bound="union")


PRESETS = {
    "adaptive": Config(),
    "quick": Config(
        preset="quick",
        num_images=16,
        num_distribution=512,
        center=CenterConfig(bound="union", n0=1000, n=10_000),
        randomized=RandomizedConfig(bound="union", n=10_000),
    ),
    "paper": Config(
        preset="paper", center=CenterConfig(bound="hoeffding"), randomized=RandomizedConfig()
    ),
}


def main(config: Config) -> None:
    encoder = ur_jax.load_encoder(config.encoder, config.name, config.representation, config.dtype)
    source = data.open_images(config.images)
    indices = data.evenly_spaced(len(source), config.num_images)
    probe, probe_hash = read_probe(config, encoder)
    settings = config.center if config.method == "center" else config.randomized
    described = {
        "encoder": encoder.name,
        "representation": encoder.representation,
        "dtype": encoder.dtype,
        "weights_sha256": ur_jax.weights_hash(encoder),
        "images": config.images,
        "listing_hash": source.listing_hash,
        "num_images": config.num_images,
        "seed": config.seed,
        "method": config.method,
        "settings": settings,
        **(
            {"num_distribution": config.num_distribution}
            if config.method == "center"
            else {"probe": config.probe, "probe_sha256": probe_hash}
        ),
    }
    run = records.open_run(config.out, described)
    job = Job(config, settings, run, encoder, source, indices)
    model = encoder if config.method == "center" else job.classifier(probe)
    job.certify(model)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("all images certified")
    if jax.process_index() == 0:
        job.finish(described)


def read_probe(config: Config, encoder: Encoder) -> tuple[Any, str | None]:
    """Returns the probe's {"kernel", "bias"} and their hash; (None, None) if there is none to read.

    Raises:
      ValueError: if randomized smoothing has no probe, or one that does not fit the encoder.
    """
    if config.method == "center" or config.probe == "nearest":
        return None, None
    if config.probe is None:
        raise ValueError(
            "Expected --probe with --method randomized: a checkpoint directory of a linear probe, "
            "or nearest, which needs no labels."
        )
    probe, _ = checkpoints.restore_encoder(config.probe)
    shapes = {name: np.shape(leaf) for name, leaf in probe.items()}
    kernel = shapes.get("kernel", ())
    if set(shapes) != {"kernel", "bias"} or kernel != (encoder.dimension, *shapes["bias"]):
        raise ValueError(
            f"Expected a probe with kernel [{encoder.dimension}, K] and bias [K] for encoder "
            f"{encoder.name!r}, got {shapes} in {config.probe}. Train one on this representation."
        )
    return probe, checkpoints.tree_hash(probe)


@dataclasses.dataclass
class Job:
    """One run: what it certifies, and the folder where it keeps what is finished."""

    config: Config
    settings: CenterConfig | RandomizedConfig
    run: records.Run
    encoder: Encoder
    source: data.ImageSource
    indices: np.ndarray

    def __post_init__(self):
        self.mesh = sharding.data_mesh()
        self.parts = self.run.path / "parts" / f"certificates-{jax.process_index()}"

    def classifier(self, probe: Any) -> Classifier:
        """The probe on the encoder; without one, the classifier into the nearest clean image."""
        if probe is not None:
            kernel, bias = jnp.asarray(probe["kernel"]), jnp.asarray(probe["bias"])
            return Classifier(self.encoder, kernel, bias)
        return nearest_image_classifier(self.encoder, self.representations("clean", self.indices))

    def representations(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Clean representations [N, D] of readable images, computed once and kept with the run."""
        path = self.run.path / f"{name}.npy"
        if not path.exists():
            encode = jax.jit(lambda encoder, images: encoder(images))
            size = 64
            batches = self.load(indices, size)
            total = math.ceil(len(indices) / size)
            rows = [
                np.asarray(encode(self.encoder, batch.images))[batch.mask]
                for batch in command.progress(batches, f"{name} representations", total)
            ]
            with records.atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.save(file, np.concatenate(rows))
        return np.load(path)

    def load(self, indices: np.ndarray, batch_size: int) -> Iterator[data.ImageBatch]:
        """Batches of prepared images."""
        return data.image_batches(
            self.source,
            indices,
            input_size=self.encoder.input_size,
            preparation=self.encoder.preparation,
            batch_size=batch_size,
        )

    def batch_size(self, model: Any) -> int:
        """The flag; else what the run began with; else what fits the device's memory."""
        if self.config.batch_size is not None:
            if self.config.batch_size < 1:
                raise ValueError(f"Expected --batch-size >= 1, got {self.config.batch_size}.")
            return self.config.batch_size
        path = self.run.path / f"batch_size-{jax.process_index()}.npy"
        if not path.exists():
            size = fit_batch_size(lambda m, x: m(x), model, (*self.encoder.input_size, 3))
            with records.atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.save(file, size)
        return int(np.load(path))

    def certify(self, model: Any) -> None:
        """Certifies this host's share of the images, but for those that are finished."""
        mine = self.indices[jax.process_index() :: jax.process_count()]
        finished = {int(row["index"]) for row in rows_of(self.parts)}
        todo = np.array([i for i in mine if int(i) not in finished], np.int64)
        labels = self.labels(model)
        described: dict[int, dict[str, Any]] = {}

        def images() -> Iterator[np.ndarray]:
            for batch in self.load(todo, _LOAD_BATCH) if len(todo) else ():
                for row in np.flatnonzero(batch.mask):
                    index = int(batch.indices[row])
                    label = labels.get(index, int(batch.labels[row]))
                    if self.config.method == "randomized" and label >= 0:
                        check_labels(np.array([label]), model.bias.shape[0])
                    described[index] = {"index": index, "name": batch.names[row], "label": label}
                    taken.append(index)
                    yield batch.images[row]

        def next_index() -> Iterator[int]:
            while True:
                yield taken.pop(0)

        # The sampler asks for an image, then for its index.
        taken: list[int] = []
        smooth = center_smoothing if self.config.method == "center" else randomized_smoothing
        with Meter(len(mine), len(finished), sum_certified(self.parts)) as meter:
            certificates = smooth(
                model,
                images(),
                jax.random.key(self.config.seed),
                config=self.settings,
                indices=next_index(),
                mesh=self.mesh,
                batch_size=self.batch_size(model),
                on_progress=meter.sampled,
            )
            self.keep(certificates, described, meter)

    def labels(self, model: Any) -> dict[int, int]:
        """Labels that replace the source's: the image itself for the classifier into images."""
        if self.config.probe != "nearest" or self.config.method == "center":
            return {}
        readable = [
            int(i) for batch in self.load(self.indices, 64) for i in batch.indices[batch.mask]
        ]
        return {index: position for position, index in enumerate(readable)}

    def keep(self, certificates: Iterable[Any], described: dict[int, Any], meter: Meter) -> None:
        """Writes finished rows every few seconds."""
        rows: list[dict[str, Any]] = []
        number, last = len(list(self.parts.glob("*.parquet"))), time.monotonic()

        def flush():
            records.write_table(
                self.parts / f"{number:06d}.parquet",
                {name: [row[name] for row in rows] for name in rows[0]},
            )

        for index, certificate in certificates:
            row = {**described.pop(index), "seed": self.config.seed, **certificate._asdict()}
            if certificate.num_bad:
                warning = f"{row['name']}: {certificate.num_bad} outputs are NaN or infinite; "
                command.console.print(warning + "not certified.", style="yellow", markup=False)
            if "decisions" in row:
                row["decisions"] = ", ".join(row["decisions"])
            rows.append({**row, "seconds": meter.finished(certificate)})
            if time.monotonic() - last > _FLUSH_SECONDS:
                flush()
                rows, number, last = [], number + 1, time.monotonic()
        if rows:
            flush()

    def finish(self, described: dict[str, Any]) -> None:
        """Merges the hosts' rows; writes the tables, the summary and the curve."""
        paths = sorted((self.run.path / "parts").glob("certificates-*"))
        rows = [row for path in paths for row in rows_of(path)]
        rows.sort(key=lambda row: row["index"])
        if not rows:
            raise ValueError(f"None of the {len(self.indices)} images could be read; see above.")
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "seconds"}
        if self.config.method == "center":
            columns |= self.relative(columns)
        times = {name: [row[name] for row in rows] for name in ("index", "seconds")}
        records.write_table(self.run.path / "times.parquet", times)
        records.write_table(self.run.path / "certificates.parquet", columns)
        curve = center_curve if self.config.method == "center" else radius_curve
        curve(self.run.path / "curves.png", columns)
        table = summary_of(self.settings, columns)
        unreadable = sorted(set(map(int, self.indices)) - set(columns["index"]))
        records.write_json(
            self.run.path / "summary.json",
            {
                **records.provenance(),
                "config": described,
                "metrics": {
                    name: {k: finite_or_none(v) for k, v in estimate._asdict().items()}
                    for name, estimate in table.items()
                },
                "samples": int(np.sum(columns["num_drawn"])),
                "unreadable": [self.source.name(i) for i in unreadable],
            },
        )
        show(self.config, table, columns)

    def relative(self, columns: dict[str, Any]) -> dict[str, Any]:
        """F(eps_out) and eps_out / median F; 1 and infinity where it abstained."""
        chosen = data.evenly_spaced(
            len(self.source), min(len(self.source), self.config.num_distribution)
        )
        clean = jnp.asarray(self.representations("distribution", chosen))
        distribution = metrics.distance_distribution(
            clean, jax.random.key(self.config.seed), divergence=self.settings.divergence
        )
        eps_out = jnp.asarray(np.array(columns["eps_out"], np.float32))
        return {
            "quantile": np.asarray(metrics.universal_quantile(distribution, eps_out)),
            "normalised": np.asarray(metrics.normalised_distance(distribution, eps_out)),
        }


class Meter:
    """The progress line: images done and certified, samples per second, time left."""

    def __init__(self, total: int, done: int, certified: int):
        self.total, self.done, self.certified = total, done, certified
        self.samples = self.session_done = self.session_drawn = 0
        self.start = self.shown = time.monotonic()
        self.status = command.console.status("")

    def __enter__(self) -> Meter:
        self.status.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.status.__exit__(*exception)
        command.console.print(self.line(), highlight=False)

    def sampled(self, num_samples: int) -> None:
        """Takes further samples into account."""
        self.samples += num_samples
        self.status.update(self.line())
        if not command.console.is_terminal and time.monotonic() - self.shown > 30:
            self.shown = time.monotonic()
            command.console.print(self.line(), highlight=False)

    def finished(self, certificate: Any) -> float:
        """Takes a finished image into account; returns the seconds that its samples took."""
        self.done += 1
        self.session_done += 1
        self.session_drawn += certificate.num_drawn
        self.certified += not certificate.abstained
        return certificate.num_drawn / max(self.rate(), 1e-9)

    def rate(self) -> float:
        """Samples per second, of this session."""
        return max(self.samples, self.session_drawn) / (time.monotonic() - self.start)

    def line(self) -> str:
        """The line."""
        left = "unknown"
        if self.session_done:
            samples = (self.total - self.done) * self.session_drawn / self.session_done
            left = f"{samples / max(self.rate(), 1e-9):.0f} s"
        return (
            f"{self.done}/{self.total} images, {self.certified} certified, "
            f"{self.rate():,.0f} samples/s, {left} left"
        )


def rows_of(parts: Path) -> list[dict[str, Any]]:
    """The rows of all parts in a folder, in the order they were written."""
    rows = []
    for path in sorted(parts.glob("*.parquet")):
        columns = records.read_table(path)
        rows += [dict(zip(columns, values)) for values in zip(*columns.values())]
    return rows


def sum_certified(parts: Path) -> int:
    """Number of certified images among the finished ones."""
    return sum(not row["abstained"] for row in rows_of(parts))


def summary_of(
    settings: CenterConfig | RandomizedConfig, columns: dict[str, Any]
) -> dict[str, intervals.Estimate]:
    """The table of a finished run: name to value with interval."""
    certified = ~np.array(columns["abstained"])
    n = len(certified)
    table = {"certified": intervals.proportion_interval(int(certified.sum()), n)}
    if isinstance(settings, CenterConfig):
        for name in ("eps_out", "quantile", "normalised"):
            table[f"median {name}"] = median_with_infinity(np.array(columns[name], np.float64))
        return table
    label, radius = np.array(columns["label"]), np.array(columns["radius"])
    largest = certified_radius(lower_bound(settings.n, settings.n, settings), settings.sigma)
    bounds = (0.0, max(largest, float(radius.max())))
    if (label < 0).any():
        for r in RADII[1:]:
            hits = int((radius >= r).sum())
            table[f"certified at radius {r:g}"] = intervals.proportion_interval(hits, n)
        table["mean radius"] = intervals.mean_interval(radius, bounds=bounds)
        return table
    correct = certified & (np.array(columns["predicted"]) == label)
    for r in RADII:
        hits = round(float(certified_accuracy(radius, correct, np.array([r]))[0]) * n)
        table[f"certified accuracy at radius {r:g}"] = intervals.proportion_interval(hits, n)
    # MACER's definition counts an incorrect image 0; the published code leaves it out.
    counted = np.where(correct, radius, 0.0)
    table["average certified radius"] = intervals.mean_interval(counted, bounds=bounds)
    if correct.any():
        over_correct = intervals.mean_interval(radius[correct], bounds=bounds)
        table["average certified radius, correct only"] = over_correct
    return table


def median_with_infinity(values: np.ndarray) -> intervals.Estimate:
    """Median with its interval, where an abstention is the largest value of all."""
    largest = np.finfo(np.float64).max
    value, low, high, n = intervals.median_interval(np.minimum(values, largest))
    value, low, high = (math.inf if v > largest / 4 else v for v in (value, low, high))
    return intervals.Estimate(value, low, high, n)


def finite_or_none(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def show(config: Config, table: dict[str, intervals.Estimate], columns: dict[str, Any]) -> None:
    """Prints the summary."""
    printed = Table(title=f"{config.method} certificates of {config.encoder} on {config.images}")
    for name in ("measure", "value", "95 % interval", "n"):
        printed.add_column(name, justify="left" if name == "measure" else "right")
    for name, (value, low, high, n) in table.items():
        printed.add_row(name, f"{value:.3f}", f"{low:.3f} to {high:.3f}", str(n))
    command.console.print(printed)
    drawn = np.array(columns["num_drawn"])
    command.console.print(
        f"{drawn.sum():,} samples, {drawn.mean():,.0f} per image. Results in {config.out}",
        highlight=False,
    )


def radius_curve(path: Path, columns: dict[str, Any]) -> None:
    """Certified accuracy (or, without labels, fraction certified) against the radius."""
    radius, label = np.array(columns["radius"]), np.array(columns["label"])
    correct = ~np.array(columns["abstained"])
    name = "fraction certified"
    if (label >= 0).all():
        correct &= np.array(columns["predicted"]) == label
        name = "certified accuracy"
    grid = np.linspace(0.0, max(float(radius.max()) * 1.05, 1e-3), 400)
    curve = certified_accuracy(radius, correct, grid)
    _plot(path, [(grid, curve, "l2 radius (pixel units)")], name)


def center_curve(path: Path, columns: dict[str, Any]) -> None:
    """Fraction certified against eps_out, as a quantile of clean distances and normalised."""
    panels = []
    for name, label in (
        ("quantile", "eps_out as a quantile of clean distances"),
        ("normalised", "eps_out / median clean distance"),
    ):
        values = np.where(columns["abstained"], math.inf, np.array(columns[name], np.float64))
        finite = values[np.isfinite(values)]
        top = 1.0 if name == "quantile" else 1.05 * finite.max(initial=1e-3)
        grid = np.linspace(0.0, top, 400)
        panels.append((grid, (values[:, None] <= grid).mean(axis=0), label))
    _plot(path, panels, "fraction certified")


def _plot(path, panels, name):
    """Curves side by side, as PNG."""
    size = (4.8 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (x, y, label) in zip(axes[0], panels):
        axis.step(x, y, where="post", color="#1d4ed8")
        axis.set(xlabel=label, ylim=(-0.02, 1.02))
    axes[0, 0].set_ylabel(name)
    with records.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    command.run(main, Config, PRESETS)
