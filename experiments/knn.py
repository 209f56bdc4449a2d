"""k-nearest-neighbour accuracy of an encoder, beside that of the raw pixels.

    python experiments/knn.py --encoder demo \\
        --images folder:cifar10/train --test-images folder:cifar10/test

Cosine similarity, a vote of k neighbours weighted by exp(similarity / 0.07) (Wu et al. 2018). Needs
labels: sub-folders, or a labelled tfds data set.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import command
import jax
import jax.numpy as jnp
import numpy as np

import ur_jax
from ur_jax import data, devices, metrics, runs


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoder, on which labelled images."""

    encoder: str
    """Checkpoint directory, published file (with --name), or an encoder that ships: demo."""
    images: str
    """Image spec of the images that vote."""
    test_images: str
    """Image spec of the images that are classified."""
    name: str | None = None
    """Which encoder a published file holds."""
    representation: str = "backbone"
    num_images: int | None = None
    """Evenly spaced subset of --images; all by default."""
    num_test_images: int | None = None
    """Evenly spaced subset of --test-images; all by default."""
    k: int = 200
    batch_size: int = 256
    out: Path | None = None
    """JSON file for the result."""


@jax.jit
def represent(encoder, images):
    """Centred pixels (B,H*W*C) and representations (B,D) of uint8 images."""
    images = images.astype(jnp.float32) / 255.0
    return images.reshape(len(images), -1) - 0.5, encoder(images)


def main(config: Config) -> None:
    encoder = ur_jax.load_encoder(config.encoder, config.name, config.representation)
    mesh = devices.data_mesh()
    devices.check_divisible(config.batch_size, mesh)
    placed = devices.replicate(mesh, encoder)

    def features(spec, num_images, title):
        source = data.open_images(spec)
        indices = data.evenly_spaced(len(source), num_images or len(source))
        decoded = data.load_uint8(
            source, indices, input_size=encoder.input_size, preparation=encoder.preparation
        )
        starts = range(0, len(decoded.images), config.batch_size)
        pixels, representations = [], []
        for start in command.progress(starts, title, len(starts)):
            batch = decoded.images[start : start + config.batch_size]
            padded, mask = devices.pad_batch(batch, config.batch_size)
            outputs = represent(placed, devices.shard(mesh, padded))
            for kept, output in zip((pixels, representations), outputs, strict=True):
                kept.append(np.asarray(output)[mask])
        return np.concatenate(pixels), np.concatenate(representations), decoded.labels

    *train, train_labels = features(config.images, config.num_images, "voting images")
    *test, test_labels = features(config.test_images, config.num_test_images, "classified images")
    result = {}
    for name, votes, asked in zip(("raw pixels", encoder.name), train, test, strict=True):
        estimate = metrics.knn_accuracy(
            jnp.asarray(votes), train_labels, jnp.asarray(asked), test_labels, k=config.k
        )
        result[name] = estimate._asdict()
        value, low, high, n = estimate
        command.console.print(
            f"{name}: {value:.2%} of {n} test images, 95 % interval {low:.2%} to {high:.2%} "
            f"(k = {config.k}, {len(votes)} voting images)",
            highlight=False,
        )
    if config.out is not None:
        described = {**runs.provenance(), "weights_sha256": ur_jax.weights_hash(encoder)}
        runs.write_json(config.out, {**described, "config": config, "accuracy": result})


if __name__ == "__main__":
    command.run(main, Config)
