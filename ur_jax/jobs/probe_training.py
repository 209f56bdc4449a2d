"""The training of a probe job: on images that are encoded anew in every epoch, or on kept features.

What is finished is kept and skipped by a run that resumes, which ends with the same probe, since
the crops and the noise of an image are keyed by its index, and the order of the images by the
epoch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from ur_jax import devices
from ur_jax.data import ProbeViews, image_batches, labels
from ur_jax.errors import UserError
from ur_jax.jobs import parts
from ur_jax.jobs.base import Session
from ur_jax.metrics.checks import check_spread
from ur_jax.probes import linear
from ur_jax.probes.linear import ProbeState
from ur_jax.training.checkpoints import TrainingCheckpoints

if TYPE_CHECKING:
    from ur_jax.jobs.probe import Probe

History = list[dict[str, float]]


def train(job: Probe, session: Session) -> tuple[dict[str, np.ndarray], History]:
    """Trains the probe of a job. All hosts make the same calls and get the same results.

    Args:
      job: opened.
      session: the folder, the host, the devices.

    Returns:
      ({"kernel": (D,K), "bias": (K,)}, one row per epoch: "epoch", "learning_rate", "loss" and
      "accuracy", over the training images as they were seen).

    Raises:
      UserError: for an image without a label, or a loss that is not finite.
    """
    key = jax.random.key(job.seed)
    num_classes = len(job.source().class_names)
    state = linear.init_state(key, job.model.dimension, num_classes, config=job.training)
    state, history = (_on_features if job.cached else _on_images)(job, session, state)
    return linear.finish(state, config=job.training), history


def _on_images(job: Probe, session: Session, state: ProbeState) -> tuple[ProbeState, History]:
    """Training on images, each batch divided over the hosts; a checkpoint after each epoch."""
    mesh, indices, config = _all_devices(session), job.indices(), job.training
    encoder, state = devices.replicate(mesh, (job.model, state))
    size = config.batch_size // session.num_hosts
    own = slice(session.host * size, (session.host + 1) * size)  # of each batch
    history: History = []
    with TrainingCheckpoints(session.run.path / "state") as saved:
        if saved.latest_step is not None:
            state, metadata = saved.restore(state)
            history = metadata["history"]
        for epoch in range(len(history), config.num_epochs):
            rate = np.float32(config.learning_rate_at(epoch))
            order, masks = (each.T[:, own] for each in _order(job, len(indices), epoch))
            views = _views(job, epoch)
            batches = image_batches(
                views, indices[order.ravel()], input_size=encoder.input_size,
                preparation=views.preparation, batch_size=size, num_workers=session.num_workers,
            )  # fmt: skip
            batches = session.progress(batches, f"epoch {epoch + 1}", len(order))
            steps = []
            for mask, batch in zip(masks, batches, strict=True):
                classes = labels.labels_of(views, batch.labels, batch.mask, batch.names)
                arrays = devices.shard(mesh, (batch.images, classes, batch.mask & mask))
                state, totals = linear.encode_and_step(encoder, state, *arrays, rate, config=config)
                steps.append(totals)
            with np.errstate(over="ignore"):  # a loss that is not finite is refused in words
                totals = linear.Totals(*np.sum(jax.device_get(steps), axis=0))
            history.append(_row(job, epoch, totals))
            saved.save(epoch + 1, state, {"history": history})
            saved.wait()  # the next step reuses the state's buffers
    return state, history


def _on_features(job: Probe, session: Session, state: ProbeState) -> tuple[ProbeState, History]:
    """Training on features that are encoded once, an epoch in one call."""
    draws, config = _encoded_draws(job, session), job.training
    # On one device: a linear layer needs no more, and its sums come out the same on any number.
    placed = jax.device_put(draws[0])
    history = []
    for epoch in range(config.num_epochs):
        if len(draws) > 1:  # one draw at a time: together they may not fit
            placed = jax.device_put(draws[epoch % len(draws)])
        order = _order(job, len(draws[0][0]), epoch)
        rate = np.float32(config.learning_rate_at(epoch))
        state, totals = linear.train_epoch(state, *placed, *order, rate, config=config)
        history.append(totals)
    history = jax.device_get(history)  # waits once, at the end
    return state, [_row(job, epoch, totals) for epoch, totals in enumerate(history)]


def _encoded_draws(job: Probe, session: Session) -> list[tuple[np.ndarray, np.ndarray]]:
    """(features (N,D), labels (N,)) of each draw of the training images."""
    encoder, indices, source = (
        devices.replicate(session.mesh, job.model), job.indices(), job.source()
    )  # fmt: skip

    def compute(batch):
        images = devices.shard(session.mesh, batch.images)
        classes = labels.labels_of(source, batch.labels, batch.mask, batch.names)
        return {"features": parts.encode(encoder, images), "label": classes}

    num_draws = min(job.num_draws, job.training.num_epochs) if job.views.is_random else 1
    draws = []
    for draw in range(num_draws):
        name, title = f"train_{draw}", f"training images, draw {draw + 1} of {num_draws}"
        job.run_stage(session, name, title, _views(job, draw), indices, compute)
        rows = session.run.read_parts(name)
        draws.append((rows["features"], rows["label"]))
    if not len(draws[0][0]):
        raise UserError(f"None of the {len(indices)} training images could be read.")
    check_spread(draws[0][0], f"encoder {job.model.name!r}")
    return draws


def _all_devices(session: Session) -> Mesh:
    """The devices of all hosts, over which a batch of images is divided."""
    return session.mesh if session.num_hosts == 1 else devices.data_mesh(jax.devices())


def _views(job: Probe, draw: int) -> ProbeViews:
    """The training images of a draw, counted from 0."""
    random, seed = job.views.augment, job.seed
    return ProbeViews(
        job.source(), job.model, job.views, random=random, seed=seed, draw=draw + 1
    )  # fmt: skip


def _order(job: Probe, num_images: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps of an epoch."""
    return linear.epoch_order(num_images, job.training.batch_size, seed=job.seed, epoch=epoch)


def _row(job: Probe, epoch: int, totals: linear.Totals) -> dict[str, float]:
    """The history's entry of an epoch; refuses a loss that is not finite."""
    count = max(float(totals.images), 1.0)
    loss, accuracy = float(totals.loss) / count, float(totals.correct) / count
    rate = job.training.learning_rate_at(epoch)
    if totals.bad:
        raise UserError(
            f"The features of {totals.bad:.0f} images were NaN or infinite in epoch {epoch + 1}: "
            "check the encoder's weights, its preprocessing and dtype."
        )
    if not math.isfinite(loss):
        raise UserError(
            f"The loss is {loss} in epoch {epoch + 1} with learning rate {rate:g}; lower it, or "
            "use batch_norm=True."
        )
    return {"epoch": epoch + 1, "learning_rate": rate, "loss": loss, "accuracy": accuracy}
