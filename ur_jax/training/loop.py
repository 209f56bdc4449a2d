"""The loop around `train_step`: data, checkpoints, metrics on disk, and resuming bit for bit."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ur_jax import devices, runs
from ur_jax.checks import check_whole
from ur_jax.data import ShuffledImages
from ur_jax.errors import UserError, require
from ur_jax.training.checkpoints import TrainingCheckpoints
from ur_jax.training.step import (
    Adversary,
    Method,
    Samples,
    StepResult,
    TrainState,
    Views,
    check_parts,
    train_step,
)
from ur_jax.training.views import AugmentConfig, augment
from ur_jax.typed import check_types
from ur_jax.types import Array, Key


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train, on which views, and what to write how often.

    Attributes:
      num_epochs: passes over the images, >= 1.
      first_view: random view that is attacked.
      second_view: the other one; None for methods that look at one view only.
      num_parts: parts of a batch whose gradients are accumulated.
      log_every: steps between rows of metrics, >= 1; a row is the mean over them.
      save_every: steps between checkpoints, >= 1; there is one after each epoch in any case.
      max_bad_steps: how many steps in a row may be skipped because loss or gradient is not finite,
        >= 0; one more stops the run.

    Raises:
      ValueError: for a number below its least.
    """

    num_epochs: int
    first_view: AugmentConfig
    second_view: AugmentConfig | None
    num_parts: int = 1
    log_every: int = 20
    save_every: int = 1000
    max_bad_steps: int = 10

    def __post_init__(self):
        check_types(self)
        check_whole(self, "max_bad_steps", least=0)
        check_whole(self, "num_epochs", "num_parts", "log_every", "save_every")


@dataclasses.dataclass
class Step:
    """A step of the loop, for whoever shows the progress.

    Attributes:
      epoch: its number, from 0.
      images: this process's share (b,H,W,3) uint8 of the batch.
      text: how training goes, once the step is done.
    """

    epoch: int
    images: np.ndarray
    text: str = ""


Watch = Callable[[Iterable[Step], str, int], Iterable[Step]]
"""watch(steps, title, how many): passes them on, and shows how far they are."""


def train(
    method: Method,
    optimizer: optax.GradientTransformation,
    adversary: Adversary | None,
    state: TrainState,
    images: ShuffledImages,
    directory: Path,
    key: Key,
    *,
    config: LoopConfig,
    mesh: Mesh | None = None,
    watch: Watch = lambda steps, title, total: steps,
    on_epoch: Callable[[int, Samples], Any] = lambda epoch, samples: None,
) -> TrainState:
    """Trains, or goes on from the newest checkpoint in `directory`, and ends with the same bits.

    Writes `state/` (the newest checkpoint), `metrics.csv` (a row every `log_every` steps) and
    `tensorboard/`. When the process is asked to stop (SIGTERM, a first Ctrl-C, or a notice of
    preemption on a pod), the state is saved first.

    Args:
      method, optimizer, adversary: as in `train_step`.
      state: before the first step; gives structure and shapes to what is restored.
      images: the data; on a mesh over several processes, each one's share.
      directory: of the run.
      key: of all that is drawn.
      config: the rest.
      mesh: devices that a batch is divided over; all local ones by default.
      watch: shows the progress.
      on_epoch: called after each epoch with its number, from 1, and a few of its last views.

    Raises:
      ValueError: if loss or gradient is not finite in more than `config.max_bad_steps` steps in a
        row, or in all there were, naming step and last checkpoint; for a batch that devices or
        parts can't divide; for a checkpoint that is damaged or of other images.
      KeyboardInterrupt, Stop: after the state was saved on request.
    """
    mesh = devices.data_mesh() if mesh is None else mesh
    devices.check_divisible(images.batch_size, mesh)
    check_parts(images.batch_size, method.group_size, config.num_parts)
    update = functools.partial(_update, method, optimizer, adversary, config)
    state = devices.replicate(mesh, state)
    per_epoch, total = images.steps_per_epoch, config.num_epochs * images.steps_per_epoch
    with TrainingCheckpoints(directory / "state", listens=True) as saved:
        known: Mapping[str, Any] = {}
        if saved.latest_step is not None:
            state, known = saved.restore(state)
            _check_same_images(known, images)
        done = int(state.step)
        with _Log(directory, done, known, config.max_bad_steps) as log:
            steps = watch(_steps(images, config.num_epochs, done), "training steps", total - done)
            for step in steps:
                state, metrics, samples = update(state, devices.shard(mesh, step.images), key)
                done += 1
                log.add(done, metrics)
                ends, stops = done % per_epoch == 0, saved.asked_to_stop(done)
                saves = ends or stops or done % config.save_every == 0
                if saves or done % config.log_every == 0:
                    log.flush(done / per_epoch, saved.latest_step)
                if saves:
                    saved.save(done, state, {"num_images": images.num_images, **log.known})
                if stops:
                    saved.stop()
                if ends:
                    on_epoch(step.epoch + 1, _on_host(samples))
                step.text = log.text  # for the progress
            log.check_end(saved.latest_step)
    return state


def last_row(directory: Path) -> dict[str, float]:
    """The newest row of a run's metrics that has any, as numbers."""
    rows = [row for row in _read_rows(directory / "metrics.csv") if row.get("loss") != "nan"]
    return {name: float(value) for name, value in rows[-1].items()} if rows else {}


def num_skipped(directory: Path) -> int:
    """How many steps of a run were skipped, as loss or gradient was not finite."""
    return sum(int(float(row.get("skipped", 0))) for row in _read_rows(directory / "metrics.csv"))


def _steps(images: ShuffledImages, num_epochs: int, done: int) -> Iterator[Step]:
    """The steps after those that are done."""
    per_epoch = images.steps_per_epoch
    for epoch in range(done // per_epoch, num_epochs):
        for batch in images.epoch(epoch, start=max(done - epoch * per_epoch, 0)):
            yield Step(epoch, batch)


def _check_same_images(known: Mapping[str, Any], images: ShuffledImages) -> None:
    """Raises UserError if an epoch had another number of images when the state was saved."""
    before = known.get("num_images", images.num_images)
    if before != images.num_images:
        raise UserError(
            f"Expected {before} readable images, as training began with, got {images.num_images}: "
            "the order of an epoch depends on their number. Look why images cannot be read."
        )


@functools.partial(
    jax.jit,
    static_argnames=("method", "optimizer", "adversary", "config"),
    donate_argnames="state",
)
def _update(
    method: Method,
    optimizer: optax.GradientTransformation,
    adversary: Adversary | None,
    config: LoopConfig,
    state: TrainState,
    images: Array,
    key: Key,
) -> StepResult:
    """One step on uint8 images: their random views, then the method."""
    images = images.astype(jnp.float32) / 255.0
    first, second, draw = jax.random.split(jax.random.fold_in(key, state.step), 3)
    views = [augment(images, first, config=config.first_view)]
    if config.second_view is not None:
        views.append(augment(images, second, config=config.second_view))
    return train_step(
        method, optimizer, adversary, state, Views(views[0], views[-1]), draw,
        num_parts=config.num_parts,
    )  # fmt: skip


def _on_host(samples: Samples) -> Samples:
    """Samples as NumPy arrays, also where they lie on several hosts' devices."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(samples, tiled=True)
    return jax.tree.map(np.asarray, samples)


class _Log:
    """Metrics on disk. Keeps them on the device until a row is due: no step waits for the host."""

    def __init__(self, directory: Path, done: int, known: Mapping[str, Any], max_bad_steps: int):
        self.text = ""
        self._max_bad_steps, self._bad_steps = max_bad_steps, known.get("bad_steps", 0)
        self._path = directory / "metrics.csv"
        # What came after the checkpoint that training goes on from is computed again.
        self._rows = [row for row in _read_rows(self._path) if int(row["step"]) <= done]
        if self._rows and known.get("metrics_sha256") not in (None, self._hash):
            raise _damaged(self._path, "its rows are not those that were written")
        for row in self._rows:  # of a version that skipped none
            row.setdefault("skipped", "0")
        self._pending: list[tuple[int, dict[str, Array]]] = []
        self._writes = jax.process_index() == 0
        if self._writes:
            purge = done + 1 if done else None
            self._board = require_board().SummaryWriter(
                str(directory / "tensorboard"), purge_step=purge
            )

    @property
    def known(self) -> dict[str, Any]:
        """What is kept with a state: the rows' hash, and how many steps before it were bad."""
        return {"metrics_sha256": self._hash, "bad_steps": self._bad_steps}

    @property
    def _hash(self) -> str:
        """SHA-256 of the rows so far."""
        lines = (",".join(map(str, row.values())) for row in self._rows)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of a step, without waiting for them."""
        self._pending.append((step, metrics))

    def flush(self, epoch: float, last_checkpoint: int | None) -> None:
        """Writes the mean of what was added since, and how many steps of it were skipped.

        Raises:
          ValueError: if too many steps in a row were not finite.
        """
        values = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        for step, metrics in values:
            self._bad_steps = self._bad_steps + 1 if metrics["skipped"] else 0
            if self._bad_steps > self._max_bad_steps:
                raise _not_finite(step, self._bad_steps, metrics, last_checkpoint)
        step, self._pending = values[-1][0], []
        good = [metrics for _, metrics in values if not metrics["skipped"]]
        mean = lambda name: float(np.mean([m[name] for m in good])) if good else float("nan")
        means = {name: mean(name) for name in values[0][1]}
        means["skipped"] = float(len(values) - len(good))
        row = {"step": step, "epoch": round(epoch, 4), **means}
        self._rows.append(row)
        self.text = f"loss {means['loss']:.4f}"
        if self._writes:
            with runs.atomic_path(self._path) as temporary, open(temporary, "w") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
                writer.writerows(self._rows)
            for name, value in means.items():
                self._board.add_scalar(name, value, step)

    def check_end(self, last_checkpoint: int | None) -> None:
        """Raises UserError if all steps of a run were skipped."""
        if self._rows and all(math.isnan(float(row["loss"])) for row in self._rows):
            last = {name: float(value) for name, value in self._rows[-1].items()}
            raise _not_finite(int(last["step"]), self._bad_steps, last, last_checkpoint)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *exception) -> None:
        if self._writes:
            self._board.close()


def require_board():
    """TensorBoard's writer, which only training needs.

    Raises:
      MissingPackageError: if it is not installed.
    """
    return require("tensorboardX", "train", "Training")


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv`, as text; none if there is no file."""
    if not path.exists():
        return []
    rows = list(csv.DictReader(path.read_bytes().decode(errors="replace").splitlines()))
    for number, row in enumerate(rows, start=2):
        try:
            int(row["step"])
            [float(value) for value in row.values()]
        except (KeyError, TypeError, ValueError):
            raise _damaged(path, f"line {number} is no row of numbers") from None
    return rows


def _damaged(path: Path, why: str) -> UserError:
    """The error for metrics that are not as they were written: computed again by training alone."""
    return UserError(
        f"{path} is damaged: {why}; move it away, and training goes on with a new one, which has "
        "the later steps."
    )


def _not_finite(
    step: int, number: int, metrics: Mapping[str, Any], last_checkpoint: int | None
) -> UserError:
    """The error for steps that were not finite, saying what may be wrong."""
    shown = ", ".join(f"{name} {value:g}" for name, value in metrics.items() if name != "skipped")
    kept = "none" if last_checkpoint is None else f"that of step {last_checkpoint}"
    remedy = "lower the learning rate, or use float32"
    if np.isfinite(metrics["loss"]):
        remedy = "look for a root, norm or division at 0 in the network, or lower the learning rate"
    row = f", the last of {number} in a row" if number > 1 else ""
    return UserError(
        f"Loss or gradient is not finite at step {step}{row} ({shown}). The last good checkpoint "
        f"is {kept}; {remedy}."
    )
