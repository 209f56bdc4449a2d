"""Samples, seconds and certificates of the fixed, exact and adaptive settings, side by side.

    python experiments/compare_certificates.py --encoder demo --images demo --num-images 4

Prints one table: center smoothing, and randomized smoothing of the classifier into the nearest of
the images (see certify.py), each in (i) the published code's setting, (ii) the exact bound with the
same samples, (iii) the adaptive tests. Seconds of (i) and (ii) include compilation.

    python experiments/compare_certificates.py --encoder demo --images demo --smoothed \\
        --num-images 32 --stream.out runs/smoothed

compares center smoothing with the other smoothed encoders instead, see `compare_smoothed`.
"""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

import jax
import numpy as np
import tyro
from rich import box
from rich.table import Table

from ur_jax import data
from ur_jax.certify import CERTIFICATES, CenterConfig, RandomizedConfig, kind_of
from ur_jax.checks import check_whole
from ur_jax.devices.memory import fit_batch_size
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.jobs import compare_smoothed, parts
from ur_jax.jobs.compare_smoothed import Smoothed
from ur_jax.jobs.progress import console
from ur_jax.probes.classifier import Classifier, nearest_image_classifier


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoder, on which images."""

    encoder: str = tyro.MISSING
    """Checkpoint directory, an encoder that ships (demo), or a function that makes one:
    package.module:make or file.py:make."""
    images: str = tyro.MISSING
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    num_images: int = 4
    seed: int = 0
    batch_size: int | None = None
    """Samples per device and forward pass; by default from the device's memory."""
    divide: int = 1
    """Divides the numbers of samples of all settings, to try it out."""
    smoothed: bool = False
    """Compare center smoothing with the other smoothed encoders instead, on one stream of noise."""
    stream: Smoothed = Smoothed()

    def __post_init__(self):
        check_whole(self, "num_images", "divide")
        check_whole(self, "batch_size", optional=True)
        if self.num_images < 2:
            raise UserError(
                f"Expected --num-images >= 2, got {self.num_images}: the images are the classes."
            )


class Compared(NamedTuple):
    """What one setting gave.

    Attributes:
      name: of the setting.
      samples: per image, on average.
      seconds: per image.
      sizes: eps_out or radius of the images that are certified.
      num_images: all images.
    """

    name: str
    samples: float
    seconds: float
    sizes: list[float]
    num_images: int


def main(config: Config) -> None:
    encoder = loading.load_encoder(config.encoder)
    source = data.open_images(config.images)
    indices = data.evenly_spaced(len(source), config.num_images)
    [batch] = data.image_batches(
        source, indices, input_size=encoder.input_size, preparation=encoder.preparation,
        batch_size=len(indices),
    )  # fmt: skip
    images = batch.images[batch.mask]
    if config.smoothed:
        size = config.batch_size or fit_batch_size(parts.encode, encoder, images.shape[1:])
        console.print(
            compare_smoothed.compare(
                config.stream, encoder, source, config.num_images, config.seed, size
            )
        )
        return
    nearest = nearest_image_classifier(encoder, parts.encode(encoder, images))
    size = config.batch_size or fit_batch_size(parts.encode, encoder, images.shape[1:])
    title = f"{config.encoder} on {len(images)} images of {config.images}"
    caption = "samples and seconds per image; size: mean eps_out or radius"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("setting")
    for name in ("samples", "seconds", "certified", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, setting in settings(config.divide):
        found = compare(name, setting, encoder, nearest, images, config.seed, size)
        table.add_row(
            name,
            f"{found.samples:,.0f}",
            f"{found.seconds:.1f}",
            f"{len(found.sizes)}/{found.num_images}",
            f"{np.mean(found.sizes):.4f}" if found.sizes else "",
        )
        seconds = found.seconds * found.num_images
        console.print(f"{name}: {seconds:.0f} s", highlight=False)
    console.print(table)


def settings(divide: int) -> list[tuple[str, CenterConfig | RandomizedConfig]]:
    """The settings compared: (name, configuration).

    Args:
      divide: of the numbers of samples, at least 1.
    """
    n0, n = max(10_000 // divide, 1200), max(100_000 // divide, 1200)
    radii = (0.05, 0.1, 0.25)
    return [
        ("center, published (Hoeffding)", CenterConfig(n0=n0, n=n, bound="hoeffding")),
        ("center, exact", CenterConfig(n0=n0, n=n, bound="exact")),
        ("center, adaptive to 5 %", CenterConfig(n0=n0, n=n, bound="union")),
        ("center, adaptive, n0 = 1,200", CenterConfig(n0=1200, n=n, bound="union")),
        ("randomized, published = exact", RandomizedConfig(n=n)),
        ("randomized, adaptive to sigma/10", RandomizedConfig(n=n, bound="union")),
        (
            f"randomized, adaptive, radii {radii}",
            RandomizedConfig(n=n, bound="union", radii=radii),
        ),
        (
            f"randomized, betting, radii {radii}",
            RandomizedConfig(n=n, bound="betting", radii=radii),
        ),
    ]


def compare(
    name: str,
    setting: CenterConfig | RandomizedConfig,
    encoder: Encoder,
    nearest: Classifier,
    images: np.ndarray,
    seed: int,
    batch_size: int,
) -> Compared:
    """Certifies all images by one setting, and measures it.

    Args:
      name: of the setting.
      setting: the setting.
      encoder: what center smoothing certifies.
      nearest: what randomized smoothing certifies.
      images: (N,H,W,3) float32 in [0,1].
      seed: of the noise.
      batch_size: samples per device and forward pass.
    """
    kind = CERTIFICATES[kind_of(setting)]
    model = encoder if kind.smooths == "encoder" else nearest
    key, sized = jax.random.key(seed), {"config": setting, "batch_size": batch_size}
    if setting.bound in ("union", "betting"):  # compiling would be most of a short run's time
        dict(kind.certify(model, images[:1], key, **sized))
    start = time.monotonic()
    certificates = dict(kind.certify(model, images, key, **sized)).values()
    seconds = time.monotonic() - start
    size = "eps_out" if isinstance(setting, CenterConfig) else "radius"
    given = [float(getattr(c, size)) for c in certificates if not c.abstained]
    samples = float(np.mean([c.num_drawn for c in certificates]))
    return Compared(name, samples, seconds / len(images), given, len(images))
