"""The rules by which the reference outputs' weights and images were made (their README)."""

from __future__ import annotations

import math
import zlib

import numpy as np


def fill(key: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """The tensor that stands under `key` in a synthetic checkpoint."""
    last = key.rsplit(".", 1)[-1]
    if dtype != "float32":
        return np.full(shape, 1 if last == "num_batches_tracked" else 0, dtype)
    rng = np.random.default_rng([zlib.crc32(key.encode("utf-8")), 2022])
    if last == "running_var" or (last == "weight" and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if last == "running_mean":
        scale = 0.1
    elif last in ("cls_token", "pos_embed"):
        scale = 0.02
    elif last == "bias":
        scale = 0.05
    else:
        amdim = key.startswith("encoder.module.") and key.endswith(".conv2.weight")
        gain = 1.0 if len(shape) == 2 else 0.1 if amdim else 1.25
        scale = math.sqrt(gain / math.prod(shape[1:]))
    values = rng.standard_normal(shape)
    values *= scale
    return values.astype(np.float32)


def image(index: int, height: int, width: int, stream: int = 7) -> np.ndarray:
    """Synthetic image (H,W,3) float32 in [0,1]."""
    rng = np.random.default_rng([index, stream])
    colour = rng.random(3)
    s = 0.2 + 0.6 * rng.random()
    coarse = rng.random((10, 10, 3))
    fine = rng.random((height, width, 3))
    up = coarse[np.arange(height)[:, None] * 10 // height, np.arange(width) * 10 // width]
    return ((1 - s) * colour + s * (0.6 * up + 0.4 * fine)).astype(np.float32)


def images(height: int, width: int, indices=(0, 1)) -> np.ndarray:
    """Synthetic images (N,H,W,3) float32 in [0,1]."""
    return np.stack([image(i, height, width) for i in indices])


def state_dict(layout: dict, group: str = "state_dict") -> dict[str, np.ndarray]:
    """The tensors of one group of a published layout, filled by the rule."""
    return {
        t["key"]: fill(t["key"], tuple(t["shape"]), t["dtype"]) for t in layout["tensors"][group]
    }
