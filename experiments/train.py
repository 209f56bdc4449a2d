"""Trains an encoder without labels.

    python experiments/train.py --encoder demo --images folder:cifar10/train --out runs/demo

Writes to --out: `state/` (the latest training state; a killed run goes on from it), `metrics.csv`
(one row per epoch) and, at the end, `encoder/`, a checkpoint for `load_encoder`.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from pathlib import Path

import command
import jax
import jax.numpy as jnp
import numpy as np

from ur_jax import augment, checkpoints, data, records, sharding, training
from ur_jax.encoders.published import ENCODERS
from ur_jax.errors import unknown_name


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, how long; the defaults are the recipe of encoder "demo"."""

    images: str
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    out: Path
    """Folder of the run."""
    encoder: str = "demo"
    """Whose network and input size to train, from random weights."""
    num_images: int | None = None
    """Evenly spaced subset of this size; all images by default."""
    seed: int = 0
    num_epochs: int = 8
    """Passes over the images."""
    view_size: int = 24
    """Height and width of the training views. Smaller than the images: cheaper, and objects, which
    a random crop enlarges, keep the size that they have in whole images."""
    batch_size: int = 256
    """Global, over all devices."""
    learning_rate: float = 0.06
    warmup_epochs: float = 0.5
    weight_decay: float = 5e-4
    key_momentum: float = 0.99
    queue_size: int = 4096
    temperature: float = 0.1
    group_size: int = 64
    """Images that share BatchNorm statistics."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def update(method, optimizer, view, state, images, key):
    """One training step on uint8 images: two random views, then the method."""
    images = images.astype(jnp.float32) / 255.0
    first, second, draw = jax.random.split(jax.random.fold_in(key, state.step), 3)
    views = training.Views(
        augment.augment(images, first, config=view), augment.augment(images, second, config=view)
    )
    return training.train_step(method, optimizer, state, views, draw)


def main(config: Config) -> None:
    ours = [name for name, spec in ENCODERS.items() if not spec.rules]  # the others are published
    if config.encoder not in ours:
        raise unknown_name("encoder to train", config.encoder, ours)
    spec = ENCODERS[config.encoder]
    mesh = sharding.data_mesh()
    sharding.check_divisible(config.batch_size, mesh)
    source = data.open_images(config.images)
    indices = data.evenly_spaced(len(source), config.num_images or len(source))
    pixels = data.load_uint8(
        source, indices, input_size=spec.input_size, preparation=spec.preparation
    ).images
    steps_per_epoch = len(pixels) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"Expected at least one batch of {config.batch_size} images, got {len(pixels)}; "
            "lower --batch-size or give more images."
        )

    method = training.MocoV2(
        spec.network(folded=False, group_size=config.group_size),
        spec.mean,
        spec.std,
        queue_size=config.queue_size,
        temperature=config.temperature,
        momentum=config.key_momentum,
    )
    schedule = training.cosine_schedule(
        config.learning_rate,
        steps_per_epoch=steps_per_epoch,
        num_epochs=config.num_epochs,
        warmup_epochs=config.warmup_epochs,
    )
    optimizer = training.sgd(schedule, weight_decay=config.weight_decay)
    init_key, target_key, step_key = jax.random.split(jax.random.key(config.seed), 3)
    example = jnp.zeros((2, *spec.input_size, 3))
    variables = jax.jit(method.network.init)(init_key, example)
    state = training.init_state(method, variables, optimizer, target_key)
    view = augment.MOCO_V2.at((config.view_size,) * 2, blur_scale=config.view_size / 224)

    described = {k: v for k, v in dataclasses.asdict(config).items() if k != "out"}
    described |= {"listing_hash": source.listing_hash, "steps_per_epoch": steps_per_epoch}
    records.open_run(config.out, described)
    with checkpoints.TrainingCheckpoints(config.out / "state") as saved:
        state = sharding.replicate(mesh, state)
        history = []
        if saved.latest_step is not None:
            state, metadata = saved.restore(state)
            history = metadata["history"]
        for epoch in range(int(state.step) // steps_per_epoch, config.num_epochs):
            order = np.random.default_rng([config.seed, epoch]).permutation(len(pixels))
            totals = []
            title = f"epoch {epoch + 1}/{config.num_epochs}"
            for i in command.progress(range(steps_per_epoch), title, steps_per_epoch):
                batch = pixels[order[i * config.batch_size : (i + 1) * config.batch_size]]
                state, metrics = update(
                    method, optimizer, view, state, sharding.shard(mesh, batch), step_key
                )
                totals.append(metrics)
            means = {k: float(np.mean([m[k] for m in totals])) for k in totals[0]}
            if not all(map(np.isfinite, means.values())):
                raise ValueError(
                    f"Loss or gradient is not finite in epoch {epoch + 1}: {means}. The last good "
                    f"checkpoint is step {saved.latest_step}; lower --learning-rate."
                )
            history.append({"epoch": epoch + 1, **means})
            saved.save(int(state.step), state, {"history": history})
            saved.wait()
            write_history(config.out / "metrics.csv", history)

    if (config.out / "encoder").exists():
        command.console.print(f"{config.out} is finished; nothing was left to do.")
        return
    trained = jax.tree.map(np.asarray, {"params": state.params, "batch_stats": state.batch_stats})
    provenance = {
        "encoder": config.encoder,
        "config": {},
        "training": described | {"history": history},
        "trained_with": records.provenance(),
    }
    checkpoints.save_encoder(config.out / "encoder", trained, provenance)
    command.console.print(f"Encoder written to {config.out / 'encoder'}", highlight=False)


def write_history(path: Path, rows: list[dict[str, float]]) -> None:
    """Writes one row per epoch as CSV."""
    with records.atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    command.run(main, Config)
