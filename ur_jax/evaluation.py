"""The label-free table of one encoder: which attacks, on which images, and what is reported.

`evaluate` wires the pure measures to images, devices and a run's folder. It goes through stages,
each made of parts, one per batch, that are written as they finish. A killed run computes only what
is missing and ends with the same numbers, since every random draw is keyed by the image it belongs
to; on several hosts, `compute` takes every `num_hosts`-th part, and `merge` reads them all.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax import memory, metrics, sharding
from ur_jax.attacks import AttackConfig, u_pgd
from ur_jax.data import ImageBatch, ImageSource, evenly_spaced, image_batches
from ur_jax.distances import distance
from ur_jax.encoders.base import Encoder
from ur_jax.errors import unknown_name
from ur_jax.intervals import Estimate
from ur_jax.records import Run, as_folder, fingerprint, open_run, write_table
from ur_jax.types import Array

DIVERGENCES = ("l1", "l2", "linf")
STAGES = ("distances", "attacks", "overlap", "breakaway")
"""What can be evaluated on its own; all but overlap need the clean representations of the bank."""

_LEVELS = np.arange(1, 1000) / 1000
_NUM_NEIGHBOURS = 5
_NUM_SHOWN = 6
_HISTORY = (
    *(f"dist_{name}" for name in DIVERGENCES),
    "cosine_similarity",
    *(f"perturb_{name}" for name in DIVERGENCES),
)
_BANK = ("num_clean", "num_distribution")
_SETTINGS = {
    "distances": _BANK,
    "attacks": (*_BANK, "num_images", "eps", "step_size", "read_at", "nearest_level"),
    "overlap": ("num_images", "overlap_eps", "overlap_steps", "step_size"),
    "breakaway": ("num_clean", "num_images", "breakaway_eps", "breakaway_steps", "step_size"),
}
# Streams of random numbers, one per use.
_UNTARGETED, _TARGETED, _TARGETS, _OVERLAP, _PAIRS, _BREAKAWAY, _DISTRIBUTION = range(7)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The label-free protocol; the defaults are the paper's.

    Attributes:
      num_images: images attacked, and pairs of the overlap risk (at most half of all images).
      num_clean: images of the bank that breakaway risk and neighbours look in; None for all.
      num_distribution: images of the distance distribution, a subset of the bank; None for all.
      eps: radii of the attacks, linf, pixel units.
      step_size: of every attack.
      read_at: steps at which attacks are read.
      overlap_eps, overlap_steps: the attacks on pairs.
      breakaway_eps, breakaway_steps: the attack of breakaway risk and neighbour accuracy.
      batch_size: images per batch, over all devices of a host; None where a script is to find the
        largest that fits, see `fit_batch_size`.
      nearest_level: distances become quantiles by the nearest stored level, as in the authors'
        code (departure 8), instead of by the exact distribution.
      seed: of every random draw.

    Raises:
      ValueError: for a value out of range.
    """

    num_images: int = 1000
    num_clean: int | None = None
    num_distribution: int | None = 100_000
    eps: tuple[float, ...] = (0.05, 0.10)
    step_size: float = 0.001
    read_at: tuple[int, ...] = (5, 10, 30, 50)
    overlap_eps: float = 0.05
    overlap_steps: int = 10
    breakaway_eps: float = 0.05
    breakaway_steps: int = 25
    batch_size: int | None = 64
    nearest_level: bool = False
    seed: int = 0

    def __post_init__(self):
        if not self.eps or not self.read_at or min(self.read_at) < 1:
            raise ValueError(
                f"Expected at least one eps and steps read_at >= 1, got {self.eps}, {self.read_at}."
            )
        for field in ("num_images", "num_clean", "num_distribution", "batch_size"):
            value = getattr(self, field)
            if value is not None and value < 2:
                raise ValueError(f"Expected {field} >= 2, got {value}.")
        for eps in (*self.eps, self.overlap_eps, self.breakaway_eps):
            self.attack(eps, 1)

    def of_stages(self, stages: Sequence[str]) -> dict[str, Any]:
        """The settings that the results of some stages depend on, {field: value}."""
        names = {"seed", "batch_size"}.union(*(_SETTINGS[stage] for stage in stages))
        return {k: v for k, v in dataclasses.asdict(self).items() if k in names}

    def attack(self, eps: float, num_steps: int) -> AttackConfig:
        """The U-PGD of these settings."""
        return AttackConfig(eps=eps, step_size=self.step_size, num_steps=num_steps)


class Measurement(NamedTuple):
    """One number of the table: the metric, what it was measured under, and its estimate."""

    metric: str
    divergence: str | None
    eps: float | None
    step: int | None
    estimate: Estimate


class Evaluation(NamedTuple):
    """What `evaluate` returns; per-image values are in the run's tables.

    Attributes:
      measurements: the table.
      unreadable: {image name: reason} of the images left out.
      gallery: arrays of the first attacked images, for `report.plot_gallery`; {} without the stage
        "breakaway".
    """

    measurements: list[Measurement]
    unreadable: dict[str, str]
    gallery: dict[str, np.ndarray]


Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""progress(iterable, description, total) passes the items on and shows how far it is."""


def evaluate(
    encoder: Encoder,
    source: ImageSource,
    run: Run,
    *,
    config: EvaluationConfig,
    stages: Sequence[str] = STAGES,
    bank: Run | None = None,
    mesh: Mesh | None = None,
    num_workers: int = 0,
    progress: Progress = lambda iterable, description, total: iterable,
) -> Evaluation:
    """Computes the paper's label-free measures of one encoder, but for certification.

    Args:
      encoder: the encoder.
      source: images, from `data.open_images`. Attacked images are evenly spaced in the listing,
        and so are those of the bank.
      run: the folder, from `records.open_run`; finished parts are not computed again. Per-image
        values go to `attacks.parquet`, `pairs.parquet` and `neighbours.parquet`, and the
        distribution of clean distances to `distances.parquet`, each by the stage it is of.
      config: the protocol.
      stages: which of `STAGES`.
      bank: folder of the clean representations, from `open_bank`, which several runs may share;
        by default `run`.
      mesh: devices, from `sharding.data_mesh`; all local ones by default.
      num_workers: processes that load images.
      progress: shows progress.

    Raises:
      ValueError: for more samples than images, a batch that does not divide over the devices, or
        an unknown stage.
    """
    compute(
        encoder, source, run, config=config, stages=stages, bank=bank, mesh=mesh,
        num_workers=num_workers, progress=progress,
    )  # fmt: skip
    return merge(run, config=config, stages=stages, bank=bank, mesh=mesh)


def compute(
    encoder: Encoder,
    source: ImageSource,
    run: Run,
    *,
    config: EvaluationConfig,
    stages: Sequence[str] = STAGES,
    bank: Run | None = None,
    host: int = 0,
    num_hosts: int = 1,
    mesh: Mesh | None = None,
    num_workers: int = 0,
    progress: Progress = lambda iterable, description, total: iterable,
) -> None:
    """Computes this host's share of the parts of `evaluate`, which see for the other arguments.

    Args:
      host: number of this host; it takes every `num_hosts`-th batch.
      num_hosts: how many there are. A run may go on with another number of them.
    """
    mesh = sharding.data_mesh() if mesh is None else mesh
    check_fits(config, source, mesh)
    _check_stages(stages)
    encoder = sharding.replicate(mesh, encoder)
    parts = _Parts(encoder, source, run, config, mesh, num_workers, progress, host, num_hosts)
    if set(stages) - {"overlap"}:
        indices = evenly_spaced(len(source), config.num_clean or len(source))
        dataclasses.replace(parts, run=bank or run).clean("clean", indices)
    for stage in stages:
        if stage != "distances":  # they follow from the bank
            getattr(parts, stage)()


def merge(
    run: Run,
    *,
    config: EvaluationConfig,
    stages: Sequence[str] = STAGES,
    bank: Run | None = None,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Writes the tables and returns the numbers of `evaluate`, once all parts are there."""
    mesh = sharding.data_mesh() if mesh is None else mesh
    _check_stages(stages)
    clean = (bank or run).read_parts("clean") if set(stages) - {"overlap"} else {}
    distributions = {}
    if {"distances", "attacks"} & set(stages):
        distributions = _distributions(clean, config)
    tables = {
        "distances": lambda: _distance_table(run, distributions, clean, config),
        "attacks": lambda: _attack_table(run, distributions, config),
        "breakaway": lambda: _breakaway_table(run, clean, config, mesh),
        "overlap": lambda: _overlap_table(run, config),
    }
    measurements = [m for stage, table in tables.items() if stage in stages for m in table()]
    gallery = _gallery(run, clean, mesh) if "breakaway" in stages else {}
    unreadable = _unreadable(run, *([clean] if clean else []))
    return Evaluation(measurements, unreadable, gallery)


def open_bank(
    folder: str | os.PathLike, described: Mapping[str, Any], num_images: int, batch_size: int
) -> Run:
    """Opens the folder of an encoder's clean representations of some images, for any run to share.

    Args:
      folder: where the folders of all of them are; this one is named after what determines them.
      described: what the results depend on; of it, the encoder's and the listing's entries count.
      num_images: evenly spaced images of the listing.
      batch_size: images per batch, over all devices.
    """
    names = ("encoder", "representation", "dtype", "weights_sha256", "listing_hash")
    settings = {name: described[name] for name in names}
    settings |= {"num_images": num_images, "batch_size": batch_size}
    return open_run(as_folder(folder) / fingerprint(settings), settings)


def clean_representations(
    encoder: Encoder,
    source: ImageSource,
    run: Run,
    indices: np.ndarray,
    *,
    stage: str = "clean",
    batch_size: int = 64,
    mesh: Mesh | None = None,
    num_workers: int = 0,
    progress: Progress = lambda iterable, description, total: iterable,
) -> dict[str, np.ndarray]:
    """Representations of the readable ones of some images, computed once and kept with the run.

    Args:
      encoder: the encoder.
      source: images, from `data.open_images`.
      run: the folder; finished parts are not computed again.
      indices: (M,) positions in the source's listing.
      stage: name of the parts.
      batch_size: images per batch, over all devices, at least 2.
      mesh: devices, from `sharding.data_mesh`; all local ones by default.
      num_workers: processes that load images.
      progress: shows progress.

    Returns:
      {"index": (N,), "clean": (N,D) float32}, N <= M, in the order of `indices`.

    Raises:
      ValueError: for a batch that does not divide over the devices.
    """
    mesh = sharding.data_mesh() if mesh is None else mesh
    sharding.check_divisible(batch_size, mesh)
    encoder, config = sharding.replicate(mesh, encoder), EvaluationConfig(batch_size=batch_size)
    _Parts(encoder, source, run, config, mesh, num_workers, progress).clean(stage, indices)
    return run.read_parts(stage)


def fit_batch_size(
    config: EvaluationConfig, encoder: Encoder, mesh: Mesh, num_hosts: int = 1
) -> int:
    """Images per batch: as many as an attack on them has room for, on all devices of a mesh.

    Args:
      config: the protocol.
      encoder: the encoder.
      mesh: a host's devices.
      num_hosts: how many there are; a batch is no larger than a host's share of attacked images.
    """
    attack = config.attack(max(config.eps), 2)  # its memory does not grow with its steps
    attacked = lambda encoder, images: u_pgd(encoder, images, jax.random.key(0), config=attack)
    most = memory.fit_batch_size(attacked, encoder, (*encoder.input_size, 3))
    return mesh.size * min(most, math.ceil(config.num_images / (num_hosts * mesh.size)))


def check_fits(config: EvaluationConfig, source: ImageSource, mesh: Mesh) -> None:
    """Raises ValueError for more samples than images, or a batch that the devices can't divide."""
    if config.batch_size is None:
        raise ValueError("Expected a batch_size, got None; `fit_batch_size` finds one.")
    sharding.check_divisible(config.batch_size, mesh)
    for num_images in (config.num_images, config.num_clean):
        evenly_spaced(len(source), num_images or len(source))


def _check_stages(stages: Sequence[str]) -> None:
    """Raises ValueError unless there are some, all known."""
    for stage in stages:
        if stage not in STAGES:
            raise unknown_name("stage", stage, STAGES)
    if not stages:
        raise ValueError(f"Expected at least one stage of {', '.join(STAGES)}.")


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What computes and writes this host's parts; see `compute` for the fields."""

    encoder: Encoder
    source: ImageSource
    run: Run
    config: EvaluationConfig
    mesh: Mesh
    num_workers: int
    progress: Progress
    host: int = 0
    num_hosts: int = 1

    def clean(self, stage: str, indices: np.ndarray) -> None:
        """Clean representations: {"index" (N,), "clean" (N,D)}."""
        title = f"{stage} representations"
        self._stage(stage, title, indices, lambda batch: {"clean": self._encode(batch)})

    def attacks(self) -> None:
        """Untargeted and targeted attacks of the same images at each eps."""
        indices = evenly_spaced(len(self.source), self.config.num_images)
        targets = _derangement(indices, self._key(_TARGETS))
        num_steps = max(self.config.read_at) + 1  # entry t is read before step t
        for eps in self.config.eps:
            attack = self.config.attack(eps, num_steps)
            for mode, stream in (("untargeted", _UNTARGETED), ("targeted", _TARGETED)):
                compute = functools.partial(self._history, stream, attack)
                others = (targets,) if mode == "targeted" else ()
                stage, title = f"{mode}_{eps:g}", f"{mode} attack, eps {eps:g}"
                self._stage(stage, title, indices, compute, *others)

    def _history(
        self, stream: int, attack: AttackConfig, batch: ImageBatch, target: ImageBatch | None = None
    ) -> dict[str, Any]:
        """What is read of an attack, at each step."""
        towards = None if target is None else self._encode(target)
        result = self._u_pgd(batch, stream, attack, towards)
        history = {name: getattr(result.history, name) for name in _HISTORY}
        return history | ({} if target is None else {"target": target.indices})

    def overlap(self) -> None:
        """Disjoint pairs, each image attacked towards the other."""
        config = self.config
        num_pairs = min(config.num_images, len(self.source) // 2)
        indices = evenly_spaced(len(self.source), 2 * num_pairs)
        indices = np.asarray(jax.random.permutation(self._key(_PAIRS), indices.astype(np.int32)))
        attack = config.attack(config.overlap_eps, config.overlap_steps)

        def compute(first, second):
            x, y = self._encode(first), self._encode(second)
            x_to_y = self._u_pgd(first, _OVERLAP, attack, y).representations
            y_to_x = self._u_pgd(second, _OVERLAP, attack, x).representations
            margins = {
                f"margin_{d}": metrics.adversarial_margin(x, y, x_to_y, y_to_x, divergence=d)
                for d in DIVERGENCES
            }
            clean = {f"clean_dist_{d}": distance(x, y, divergence=d) for d in DIVERGENCES}
            return {"second": second.indices, **margins, **clean}

        first, second = indices[:num_pairs], indices[num_pairs:]
        self._stage("overlap", "pairs attacked both ways", first, compute, second)

    def breakaway(self) -> None:
        """The attack whose images are looked up among the clean ones."""
        config = self.config
        attack = config.attack(config.breakaway_eps, config.breakaway_steps)
        indices = evenly_spaced(len(self.source), config.num_images)

        def compute(batch):
            result, clean = self._u_pgd(batch, _BREAKAWAY, attack, None), self._encode(batch)
            if batch.indices[0] == indices[0]:
                readable = np.flatnonzero(batch.mask)  # and no padding
                count = min(_NUM_SHOWN, len(readable))
                rows = readable[evenly_spaced(len(readable), count)] if count else readable
                shown = {"images": batch.images, "attacked_images": np.asarray(result.images)}
                shown["index"] = batch.indices
                self.run.write_part("gallery", 0, {k: v[rows] for k, v in shown.items()})
            return {"attacked": result.representations, "clean": clean}

        self._stage("breakaway", "breakaway attack", indices, compute)

    def _stage(
        self,
        stage: str,
        title: str,
        indices: np.ndarray,
        compute: Callable[..., dict[str, Any]],
        *more_indices: np.ndarray,
    ) -> None:
        """Computes this host's missing parts of a stage, one per batch."""
        run_stage(
            self.run,
            stage,
            math.ceil(len(indices) / self.config.batch_size),
            lambda numbers: (self._batches(each, numbers) for each in (indices, *more_indices)),
            compute,
            host=self.host,
            num_hosts=self.num_hosts,
            title=title,
            progress=self.progress,
        )

    def _batches(self, indices: np.ndarray, numbers: Sequence[int]) -> Iterator[ImageBatch]:
        """The batches of some images that have these numbers."""
        return image_batches(
            self.source,
            part_indices(indices, numbers, self.config.batch_size),
            input_size=self.encoder.input_size,
            preparation=self.encoder.preparation,
            batch_size=self.config.batch_size,
            num_workers=self.num_workers,
        )

    def _key(self, stream: int) -> Array:
        """The key of one use of randomness."""
        return jax.random.fold_in(jax.random.key(self.config.seed), stream)

    def _encode(self, batch: ImageBatch) -> Array:
        """Clean representations (B,D) of a batch."""
        return _encode(self.encoder, sharding.shard(self.mesh, batch.images))

    def _u_pgd(self, batch: ImageBatch, stream: int, attack: AttackConfig, target: Array | None):
        """`u_pgd` of a batch over the devices, each image's start drawn by its own index."""
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys = fold(self._key(stream), batch.indices.astype(np.uint32))
        images, keys = sharding.shard(self.mesh, (batch.images, keys))
        return u_pgd(self.encoder, images, keys, config=attack, target=target)


def run_stage(
    run: Run,
    stage: str,
    num_parts: int,
    batches_of: Callable[[Sequence[int]], Iterable[Iterator[ImageBatch]]],
    compute: Callable[..., dict[str, Any]],
    *,
    host: int = 0,
    num_hosts: int = 1,
    title: str,
    progress: Progress = lambda iterable, description, total: iterable,
) -> None:
    """Computes the missing parts of a stage, one per batch, and keeps the rows of readable images.

    Args:
      run: the folder.
      stage: name of the parts.
      num_parts: how many there are when all is done.
      batches_of: numbers of parts -> iterators over their batches; there are several where a row
        takes several images.
      compute: a batch of each iterator -> {name: (B, ...)}; "index" and "unreadable" are added.
      host: number of this host; it takes every `num_hosts`-th part.
      num_hosts: how many there are.
      title: for the progress.
      progress: shows progress.
    """
    missing = [n for n in range(host, num_parts, num_hosts) if not run.has_part(stage, n)]
    if not missing:
        return
    batches = progress(zip(*batches_of(missing), strict=True), title, len(missing))
    for number, group in zip(missing, batches, strict=True):
        values = jax.tree.map(np.asarray, compute(*group))
        mask = np.logical_and.reduce([batch.mask for batch in group])
        rows = {name: value[mask] for name, value in values.items()}
        skipped = [image for batch in group for image in batch.unreadable]
        rows["unreadable"] = np.array(skipped, np.str_).reshape(-1, 2)
        run.write_part(stage, number, rows | {"index": group[0].indices[mask]})


def part_indices(indices: np.ndarray, numbers: Sequence[int], batch_size: int) -> np.ndarray:
    """The indices of some parts of `batch_size` each; only the very last may be smaller."""
    return np.concatenate([indices[n * batch_size : (n + 1) * batch_size] for n in numbers])


@jax.jit
def _encode(encoder: Encoder, images: Array) -> Array:
    """The encoder, compiled."""
    return encoder(images)


def _derangement(indices: np.ndarray, key: Array) -> np.ndarray:
    """Gives every image another one as target: the next on a random cycle through all of them."""
    order = np.asarray(jax.random.permutation(key, len(indices)))
    targets = np.empty_like(indices)
    targets[order] = indices[np.roll(order, -1)]
    return targets


def _distributions(
    bank: dict[str, np.ndarray], config: EvaluationConfig
) -> dict[str, metrics.DistanceDistribution]:
    """Distribution of clean distances by each divergence, over evenly spaced images of the bank."""
    clean = bank["clean"]
    wanted = len(clean) if config.num_distribution is None else config.num_distribution
    chosen = jnp.asarray(clean[evenly_spaced(len(clean), min(wanted, len(clean)))])
    key = jax.random.fold_in(jax.random.key(config.seed), _DISTRIBUTION)
    return {d: metrics.distance_distribution(chosen, key, divergence=d) for d in DIVERGENCES}


def _distance_table(run, distributions, bank, config) -> Iterator[Measurement]:
    """Median clean distances; writes the quantiles of the distribution to `distances.parquet`.

    No interval: pairs share images, so they are not independent.
    """
    columns = {"level": _LEVELS}
    for d, distribution in distributions.items():
        columns[f"dist_{d}"] = np.quantile(np.asarray(distribution.distances), _LEVELS)
        count = min(config.num_distribution or len(bank["clean"]), len(bank["clean"]))
        estimate = Estimate(float(distribution.median), math.nan, math.nan, count)
        yield Measurement("median_clean_distance", d, None, None, estimate)
    write_table(run.path / "distances.parquet", columns)


def _attack_table(run, distributions, config) -> Iterator[Measurement]:
    """Measurements of the attacks at each eps and step; writes `attacks.parquet`."""
    tables = []
    for eps in config.eps:
        for mode in ("untargeted", "targeted"):
            part = run.read_parts(f"{mode}_{eps:g}")
            values = {"cosine_similarity": {None: part["cosine_similarity"]}}
            shares = {
                d: metrics.universal_quantile(
                    distributions[d], part[f"dist_{d}"], nearest_level=config.nearest_level
                )
                for d in DIVERGENCES
            }
            if mode == "untargeted":
                values["universal_quantile"] = shares
                values["normalised_distance"] = {
                    d: metrics.normalised_distance(distributions[d], part[f"dist_{d}"])
                    for d in DIVERGENCES
                }
            else:
                del values["cosine_similarity"]  # robust is high against the clean image only
                values["universal_quantile_targeted"] = shares
                values["relative_quantile"] = {
                    d: metrics.relative_quantile(part[f"dist_{d}"], part[f"dist_{d}"][:, :1])
                    for d in DIVERGENCES
                }
            for name, by_divergence in values.items():
                for d, value in by_divergence.items():
                    for step in config.read_at:
                        yield _measure(name, d, eps, step, np.asarray(value)[:, step])
            tables.append(_attack_rows(part, mode, eps, shares))
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    write_table(run.path / "attacks.parquet", columns)


def _attack_rows(part, mode, eps, shares) -> dict[str, np.ndarray]:
    """One row per image and step."""
    num_images, num_steps = part["dist_l2"].shape
    return {
        "image": np.repeat(part["index"], num_steps),
        "mode": np.full(num_images * num_steps, mode),
        "target": np.repeat(part.get("target", np.full(num_images, -1)), num_steps),
        "eps": np.full(num_images * num_steps, eps),
        "step": np.tile(np.arange(num_steps), num_images),
        **{name: part[name].ravel() for name in _HISTORY},
        **{f"universal_quantile_{d}": np.asarray(share).ravel() for d, share in shares.items()},
    }


def _breakaway_table(run, bank, config, mesh) -> Iterator[Measurement]:
    """Breakaway risk and neighbour accuracy, by l2; writes `neighbours.parquet`."""
    part = run.read_parts("breakaway")
    places = {index: row for row, index in enumerate(bank["index"])}
    ranks = metrics.neighbour_ranks(
        jnp.asarray(part["attacked"]),
        jnp.asarray(part["clean"]),
        bank["clean"],
        own_index=np.array([places.get(index, -1) for index in part["index"]]),
        mesh=mesh,
    )
    values = {
        "breakaway_risk": metrics.breakaway_risk(ranks),
        "top_1_accuracy": metrics.nearest_neighbour_hits(ranks, k=1),
        "top_5_accuracy": metrics.nearest_neighbour_hits(ranks, k=5),
    }
    columns = {"image": part["index"], "rank": ranks.rank, "compared": ranks.compared}
    write_table(
        run.path / "neighbours.parquet", {name: np.asarray(x) for name, x in columns.items()}
    )
    for name, value in values.items():
        yield _measure(name, "l2", config.breakaway_eps, config.breakaway_steps, value)


def _overlap_table(run, config) -> Iterator[Measurement]:
    """Margins and overlap risk; writes `pairs.parquet`."""
    part = run.read_parts("overlap")
    columns = {"first": part["index"], "second": part["second"]}
    for d in DIVERGENCES:
        columns |= {name: part[name] for name in (f"margin_{d}", f"clean_dist_{d}")}
        margins = part[f"margin_{d}"]
        margins = margins[np.isfinite(margins)]  # two copies of an image have none
        for name, value in (
            ("adversarial_margin", margins),
            ("overlap_risk", (margins < 0).astype(np.float32)),
        ):
            yield _measure(name, d, config.overlap_eps, config.overlap_steps, value)
    write_table(run.path / "pairs.parquet", columns)


def _measure(name, divergence, eps, step, values) -> Measurement:
    """Summarises the finite values: a ratio to the distance of two copies of an image is none."""
    values = np.asarray(values)
    estimate = metrics.summarise(name, values[np.isfinite(values)])
    return Measurement(name, divergence, eps, step, estimate)


def _unreadable(run: Run, *read: Mapping[str, np.ndarray]) -> dict[str, str]:
    """{name: reason} of every image that some stage could not read."""
    stages = {path.name for path in (run.path / "parts").glob("*")} - {"gallery"}
    parts = [*read, *(run.read_parts(stage) for stage in sorted(stages))]
    skipped = [part["unreadable"] for part in parts]
    return dict(sorted(map(tuple, np.concatenate(skipped).tolist())))


def _gallery(run: Run, bank: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """The shown images, attacked, and the bank's rows nearest to them: "neighbours" (S,K)."""
    gallery, attacked = run.read_parts("gallery"), run.read_parts("breakaway")["attacked"]
    shown = run.read_parts("breakaway")["index"]
    rows = [np.flatnonzero(shown == index)[0] for index in gallery["index"] if index in shown]
    k = min(_NUM_NEIGHBOURS, len(bank["clean"]))
    nearest = metrics.nearest_neighbours(jnp.asarray(attacked[rows]), bank["clean"], k=k, mesh=mesh)
    keep = np.isin(gallery["index"], shown)
    gallery = {name: value[keep] for name, value in gallery.items()}
    return gallery | {"neighbours": bank["index"][np.asarray(nearest.indices)]}
