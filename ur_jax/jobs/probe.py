"""Linear probes of an encoder on labelled images: training, testing, and the probe on disk.

A `Job` wires `probes.linear` to images, devices and a run's folder. What is finished is kept and
skipped by a run that resumes, which ends with the same probe, since the crops and the noise of an
image are keyed by its index, and the order of the images by the epoch.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax import devices
from ur_jax.certify import Classifier
from ur_jax.data import ImageBatch, ImageSource, ProbeViews, ViewConfig, image_batches
from ur_jax.devices import hosts
from ur_jax.encoders import checkpoints
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError, unknown_name
from ur_jax.jobs.label_free import Progress, part_indices, run_stage
from ur_jax.probes import linear
from ur_jax.probes.linear import ProbeConfig, ProbeState
from ur_jax.runs import Run, write_table
from ur_jax.stats.intervals import Estimate, proportion_interval
from ur_jax.types import Array

TOP = (1, 5)
"""The k of the top-k accuracies that are reported."""


class Accuracy(NamedTuple):
    """One number of a probe's table: "top_1_accuracy", on which kind of images, its estimate."""

    metric: str
    images: str
    estimate: Estimate


@dataclasses.dataclass(frozen=True)
class Job:
    """A linear probe, in a run's folder.

    Attributes:
      encoder: the encoder, in the representation that the probe reads.
      source: labelled images, from `data.open_images`.
      indices: (N,) the positions of those to train on.
      run: the folder, from `records.open_run`.
      config: the training.
      views: which images the probe sees.
      num_draws: None trains as the paper does, on fresh crops and noise in every epoch. A number
        encodes that many draws of each image once, keeps the features, and trains on draw
        (epoch mod num_draws): far faster, with fewer crops and less noise to learn from. As many
        draws as epochs give the paper's training again. Where nothing is random one draw is taken.
      seed: of weights, order, crops and noise.
      mesh: this host's devices, from `devices.data_mesh`; all by default.
      num_workers: processes that load images.
      progress: shows progress.
      host: number of this host. On several hosts all make the same calls, in the same order, and
        get the same results: batches are divided over the hosts (in the paper's training, each
        batch is), and the first one writes the tables.
      num_hosts: how many there are.

    Raises:
      ValueError: for images without classes, or a batch that does not divide over the devices.
    """

    encoder: Encoder
    source: ImageSource
    indices: np.ndarray
    run: Run
    config: ProbeConfig = ProbeConfig()
    views: ViewConfig = ViewConfig()
    num_draws: int | None = None
    seed: int = 0
    mesh: Mesh = dataclasses.field(default_factory=devices.data_mesh)
    num_workers: int = 0
    progress: Progress = lambda iterable, description, total: iterable
    host: int = 0
    num_hosts: int = 1

    def __post_init__(self):
        check_classes(self.source)
        devices.check_divisible(self.config.batch_size, self._training_mesh)
        if self.num_draws is not None and self.num_draws < 1:
            raise UserError(f"Expected num_draws >= 1, got {self.num_draws}.")

    def train(self) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
        """Trains the probe.

        Returns:
          ({"kernel": (D,K), "bias": (K,)}, one row per epoch: "epoch", "learning_rate", "loss"
          and "accuracy", over the training images as they were seen).

        Raises:
          ValueError: for an image without a label, or a loss that is not finite.
        """
        key = jax.random.key(self.seed)
        state = linear.init_state(key, self.encoder.dimension, len(self.source.class_names))
        train = self._train_streaming if self.num_draws is None else self._train_cached
        state, history = train(state)
        return linear.finish(state, config=self.config), history

    def test(
        self, trained: Mapping[str, Any], source: ImageSource, indices: np.ndarray
    ) -> list[Accuracy]:
        """Classifies images of the probe's kind, and clean ones; writes `predictions.parquet`.

        Args:
          trained: the probe.
          source: labelled images whose classes, by name, are among the training images'.
          indices: (M,) the positions of those to classify.

        Raises:
          ValueError: for another class, an image without a label, or no readable image.
        """
        check_classes(source)
        known = self.source.class_names
        for name in source.class_names:
            if name not in known:
                raise unknown_name("class of the test images", name, known)
        classes = np.array([known.index(name) for name in source.class_names], np.int32)
        kernel, bias = (jnp.asarray(trained[name]) for name in ("kernel", "bias"))
        classifier = devices.replicate(self.mesh, Classifier(self.encoder, kernel, bias))

        def compute(batch):
            labels = classes[_labels(batch)]
            images, shared = devices.shard(self.mesh, (batch.images, labels))
            predicted, rank = linear.classify(classifier, images, shared)
            names = np.array(batch.names)
            return {"name": names, "label": labels, "predicted": predicted, "rank": rank}

        accuracies, tables = [], []
        for kind in dict.fromkeys((self.views.kind, "standard")):
            stage, views = f"test_{kind}", dataclasses.replace(self.views, kind=kind)
            seen = ProbeViews(source, self.encoder, views, random=False, seed=self.seed)
            self._stage(stage, f"{kind} test images", seen, indices, compute)
            rows = self.run.read_parts(stage)
            if not len(rows["index"]):
                raise UserError(f"None of the {len(indices)} test images could be read.")
            for k in TOP:
                hits = int((rows["rank"] < k).sum())
                estimate = proportion_interval(hits, len(rows["rank"]))
                accuracies.append(Accuracy(f"top_{k}_accuracy", kind, estimate))
            columns = ("index", "name", "label", "predicted", "rank")
            kinds = np.full(len(rows["index"]), kind)
            tables.append({"images": kinds} | {name: rows[name] for name in columns})
        joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        if self.host == 0:
            write_table(self.run.path / "predictions.parquet", joined)
        return accuracies

    def unreadable(self) -> dict[str, str]:
        """{name: reason} of the images left out of what was encoded and tested so far."""
        stages = sorted(path.name for path in (self.run.path / "parts").iterdir())
        skipped = [self.run.read_parts(stage)["unreadable"] for stage in stages]
        return dict(sorted(map(tuple, np.concatenate(skipped).tolist())))

    @property
    def _training_mesh(self) -> Mesh:
        """Whose devices share a batch: of training on images, those of all hosts."""
        is_alone = self.num_hosts == 1 or self.num_draws is not None
        return self.mesh if is_alone else devices.data_mesh(jax.devices())

    def _train_streaming(self, state: ProbeState) -> tuple[ProbeState, list[dict[str, float]]]:
        """Training on images, encoded anew in every epoch; a checkpoint after each."""
        mesh = self._training_mesh
        encoder, state = devices.replicate(mesh, (self.encoder, state))
        size = self.config.batch_size // self.num_hosts
        own = slice(self.host * size, (self.host + 1) * size)  # of each batch
        history: list[dict[str, float]] = []
        with checkpoints.TrainingCheckpoints(self.run.path / "state") as saved:
            if saved.latest_step is not None:
                state, metadata = saved.restore(state)
                history = metadata["history"]
            for epoch in range(len(history), self.config.num_epochs):
                rate = np.float32(self.config.learning_rate_at(epoch))
                order, masks = (each.T[:, own] for each in self._order(len(self.indices), epoch))
                batches = self._batches(self._views(epoch), self.indices[order.ravel()], size)
                batches = self.progress(batches, f"epoch {epoch + 1}", len(order))
                steps = []
                for mask, batch in zip(masks, batches, strict=True):
                    arrays = (batch.images, _labels(batch), batch.mask & mask)
                    arrays = devices.shard(mesh, arrays)
                    state, totals = linear.encode_and_step(
                        encoder, state, *arrays, rate, config=self.config
                    )
                    steps.append(totals)
                totals = linear.Totals(*np.sum(jax.device_get(steps), axis=0))
                history.append(self._row(epoch, totals))
                saved.save(epoch + 1, state, {"history": history})
                saved.wait()  # the next step reuses the state's buffers
        return state, history

    def _train_cached(self, state: ProbeState) -> tuple[ProbeState, list[dict[str, float]]]:
        """Training on features that are encoded once, an epoch in one call."""
        encoder = devices.replicate(self.mesh, self.encoder)

        def compute(batch):
            images = devices.shard(self.mesh, batch.images)
            return {"features": _encode(encoder, images), "label": _labels(batch)}

        is_random = self.views.augment or self.views.kind == "noisy"
        num_draws = min(self.num_draws, self.config.num_epochs) if is_random else 1
        draws = []
        for draw in range(num_draws):
            stage, title = f"train_{draw}", f"training images, draw {draw + 1} of {num_draws}"
            self._stage(stage, title, self._views(draw), self.indices, compute)
            rows = self.run.read_parts(stage)
            draws.append((rows["features"], rows["label"]))
        if not len(draws[0][0]):
            raise UserError(f"None of the {len(self.indices)} training images could be read.")
        # On one device: a linear layer needs no more, and its sums come out the same on any number.
        placed = jax.device_put(draws[0])
        history = []
        for epoch in range(self.config.num_epochs):
            if num_draws > 1:  # one draw at a time: together they may not fit
                placed = jax.device_put(draws[epoch % num_draws])
            order = self._order(len(draws[0][0]), epoch)
            rate = np.float32(self.config.learning_rate_at(epoch))
            state, totals = linear.train_epoch(state, *placed, *order, rate, config=self.config)
            history.append(totals)
        history = jax.device_get(history)  # waits once, at the end
        return state, [self._row(epoch, totals) for epoch, totals in enumerate(history)]

    def _row(self, epoch: int, totals: linear.Totals) -> dict[str, float]:
        """The history's entry of an epoch; refuses a loss that is not finite."""
        count = max(float(totals.count), 1.0)
        loss, accuracy = float(totals.loss) / count, float(totals.correct) / count
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is {loss} in epoch {epoch + 1} with learning rate "
                f"{self.config.learning_rate_at(epoch):g}; lower it, or use batch_norm=True."
            )
        rate = self.config.learning_rate_at(epoch)
        return {"epoch": epoch + 1, "learning_rate": rate, "loss": loss, "accuracy": accuracy}

    def _order(self, num_images: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The steps of an epoch."""
        return linear.epoch_order(num_images, self.config.batch_size, seed=self.seed, epoch=epoch)

    def _views(self, draw: int) -> ProbeViews:
        """The training images of a draw, counted from 0."""
        random = self.views.augment
        return ProbeViews(
            self.source, self.encoder, self.views, random=random, seed=self.seed, draw=draw + 1
        )

    def _stage(self, stage, title, views, indices, compute) -> None:
        """Computes the missing parts of a stage over the views of some images, on all hosts."""
        size = self.config.batch_size
        with hosts.before_merge(self.num_hosts):
            run_stage(
                self.run,
                stage,
                math.ceil(len(indices) / size),
                lambda numbers: (self._batches(views, part_indices(indices, numbers, size), size),),
                compute,
                host=self.host,
                num_hosts=self.num_hosts,
                title=title,
                progress=self.progress,
            )

    def _batches(
        self, views: ProbeViews, indices: np.ndarray, batch_size: int
    ) -> Iterator[ImageBatch]:
        """Batches of views at the encoder's input size."""
        return image_batches(
            views,
            indices,
            input_size=self.encoder.input_size,
            preparation=views.preparation,
            batch_size=batch_size,
            num_workers=self.num_workers,
        )


def check_classes(source: ImageSource) -> None:
    """Raises ValueError unless the images of a source have at least two classes."""
    if len(source.class_names) < 2:
        raise UserError(
            f"Expected labelled images of at least 2 classes, got {source.spec!r} with "
            f"{list(source.class_names)}; give a folder with a sub-folder per class, or a labelled "
            "data set."
        )


def save_probe(
    path: str | os.PathLike,
    trained: Mapping[str, Any],
    encoder: Encoder,
    metadata: Mapping[str, Any],
) -> None:
    """Writes a probe as a checkpoint that knows which encoder it reads.

    Args:
      path: the directory to make; it must not exist.
      trained: {"kernel": (D,K), "bias": (K,)}.
      encoder: what it was trained on.
      metadata: JSON data to keep with it, such as "kind" and "class_names".

    Raises:
      ValueError: if something is at `path` already.
    """
    belongs = {"output": _output(encoder), "weights": _weights(encoder)}
    checkpoints.save_encoder(
        path,
        dict(trained),
        {"encoder": encoder.name, "config": {}, "probe": {**metadata, **belongs}},
    )


def restore_probe(
    path: str | os.PathLike, encoder: Encoder
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Reads a linear probe on an encoder.

    Args:
      path: checkpoint directory.
      encoder: the encoder, with representations of dimension D; in float32 or bfloat16.

    Returns:
      ({"kernel": (D,K), "bias": (K,)}, what `save_probe` kept with it). A probe that was saved
      without it, by `checkpoints.save_encoder`, has {} and is only checked for its shape.

    Raises:
      FileNotFoundError: if there is no such directory.
      ValueError: for a checkpoint of something else, or a probe on another representation or other
        weights.
    """
    trained, metadata = checkpoints.restore_encoder(path)
    known = metadata.get("probe", {})
    expected, output = known.get("output"), _output(encoder)
    if expected not in (None, output):
        raise UserError(
            f"The probe {path} reads the representation {expected!r} of encoder "
            f"{metadata['encoder']!r}, got {output!r} (dimension {encoder.dimension}); load the "
            f"encoder with representation={expected!r}, or train a probe on this one."
        )
    shapes = {name: np.shape(leaf) for name, leaf in trained.items()}
    kernel = shapes.get("kernel", ())
    if set(shapes) != {"kernel", "bias"} or kernel != (encoder.dimension, *shapes["bias"]):
        raise UserError(
            f"Expected a probe with kernel [{encoder.dimension}, K] and bias [K] for encoder "
            f"{encoder.name!r}, got {shapes} in {path}. Train one on this representation."
        )
    if "weights" in known and known["weights"] != _weights(encoder):
        raise UserError(
            f"The probe {path} was trained on other weights of encoder {metadata['encoder']!r} "
            f"than those given; name the encoder that it belongs to, or train another probe."
        )
    return trained, known


def _output(encoder: Encoder) -> str:
    """Which output of its network an encoder gives: "paper" and "features" may be the same one."""
    return getattr(encoder.apply_fn, "representation", encoder.representation)


def _weights(encoder: Encoder) -> str:
    """Hash of the weights, rounded to bfloat16: the same for both compute dtypes."""
    cast = lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return checkpoints.tree_hash(jax.tree.map(cast, encoder.params))


def _labels(batch: ImageBatch) -> np.ndarray:
    """Labels (B,) of a batch, 0 where it is masked; refuses an image without one."""
    bad = np.flatnonzero(batch.mask & (batch.labels < 0))
    if bad.size:
        raise UserError(
            f"Expected a label with every image, got none with {batch.names[bad[0]]}; put it in "
            "the sub-folder of its class, or leave it out."
        )
    return np.where(batch.mask, batch.labels, 0)


@jax.jit
def _encode(encoder: Encoder, images: Array) -> Array:
    """The encoder, compiled."""
    return encoder(images)
