"""What a certificate job adds for a few images: how far the smoothed encoder moves under attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ur_jax.certify.center.table import median_with_infinity
from ur_jax.certify.joint import attacked_image, movement
from ur_jax.data import ImageSource
from ur_jax.encoders.base import Encoder
from ur_jax.jobs.base import Session
from ur_jax.jobs.certify_parts import Images
from ur_jax.runs import Row, Run


def attack(
    session: Session, encoder: Encoder, source: ImageSource, indices: np.ndarray, *, method: str,
    config: Any, seed: int, batch_size: int,
) -> None:  # fmt: skip
    """Attacks this host's share of the images, and writes a part for each."""
    mine = indices[session.host :: session.num_hosts]
    left = np.array([i for i in mine if not session.run.num_parts(_stage(i))], int)
    images = Images(source, left, encoder, lambda batch: batch.labels)
    taken = images.taken()
    for image in images:
        index = next(taken)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), index)
        moved = attacked_image(encoder, image, key, config=config)
        away = movement(
            encoder, image, moved, key, method=method, config=config, batch_size=batch_size
        )
        session.run.write_part(_stage(index), 0, {"index": [index], "moved": [away]})


def over_found(
    run: Run, indices: np.ndarray, columns: Mapping[str, np.ndarray], *, method: str, config: Any
) -> Iterator[Row]:
    """The row of what was certified over what the attack found."""
    certified = dict(zip(columns["index"].tolist(), columns["eps_out"]))
    parts = [run.read_parts(_stage(i)) for i in indices if run.num_parts(_stage(i))]
    ratios = [
        float(certified[int(part["index"][0])][0]) / max(float(part["moved"][0]), 1e-30)
        for part in parts
        if int(part["index"][0]) in certified
    ]
    if ratios:
        estimate = median_with_infinity(np.array(ratios))
        yield Row.of("certified_over_found", estimate, radius=config.eps_in[0], images=method)


def _stage(index: int) -> str:
    """Of an image's part."""
    return f"attacked-{index}"
