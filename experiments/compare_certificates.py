"""Samples, seconds and certificates of the fixed, exact and adaptive settings, side by side.

    python experiments/compare_certificates.py --encoder demo --images demo --num-images 4

Prints one table: center smoothing, and randomized smoothing of the classifier into the nearest of
the images (see certify.py), each in (i) the published code's setting, (ii) the exact bound with the
same samples, (iii) the adaptive tests. Seconds of (i) and (ii) include compilation.
"""

from __future__ import annotations

import dataclasses
import time

import command
import jax
import numpy as np
import tyro
from rich import box
from rich.table import Table

import ur_jax
from ur_jax import data
from ur_jax.certify import (
    CenterConfig,
    RandomizedConfig,
    center_smoothing,
    nearest_image_classifier,
    randomized_smoothing,
)
from ur_jax.devices.memory import fit_batch_size
from ur_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoder, on which images."""

    encoder: str = tyro.MISSING
    """Checkpoint directory or an encoder that ships: demo."""
    images: str = tyro.MISSING
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    num_images: int = 4
    seed: int = 0
    batch_size: int | None = None
    """Samples per device and forward pass; by default from the device's memory."""
    divide: int = 1
    """Divides the numbers of samples of all settings, to try it out."""

    def __post_init__(self):
        if self.num_images < 2:
            raise UserError(
                f"Expected --num-images >= 2, got {self.num_images}: the images are the classes."
            )


def settings(divide: int) -> list[tuple[str, CenterConfig | RandomizedConfig]]:
    """The settings compared: (name, configuration)."""
    n0, n = max(10_000 // divide, 1200), max(100_000 // divide, 1200)
    radii = (0.05, 0.1, 0.25)
    center = lambda **kw: CenterConfig(n0=kw.pop("n0", n0), n=n, **kw)
    randomized = lambda **kw: RandomizedConfig(n=n, **kw)
    return [
        ("center, published (Hoeffding)", center(bound="hoeffding")),
        ("center, exact", center(bound="exact")),
        ("center, adaptive to 5 %", center(bound="union")),
        ("center, adaptive, n0 = 1,200", center(bound="union", n0=1200)),
        ("randomized, published = exact", randomized()),
        ("randomized, adaptive to sigma/10", randomized(bound="union")),
        (f"randomized, adaptive, radii {radii}", randomized(bound="union", radii=radii)),
        (f"randomized, betting, radii {radii}", randomized(bound="betting", radii=radii)),
    ]


def main(config: Config) -> None:
    encoder = ur_jax.load_encoder(config.encoder)
    source = data.open_images(config.images)
    indices = data.evenly_spaced(len(source), config.num_images)
    [batch] = data.image_batches(
        source, indices, input_size=encoder.input_size, preparation=encoder.preparation,
        batch_size=len(indices),
    )  # fmt: skip
    images = batch.images[batch.mask]
    nearest = nearest_image_classifier(encoder, jax.jit(encode)(encoder, images))
    batch_size = config.batch_size or fit_batch_size(encode, encoder, images.shape[1:])
    title = f"{config.encoder} on {len(images)} images of {config.images}"
    caption = "samples and seconds per image; size: mean eps_out or radius"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("setting")
    for name in ("samples", "seconds", "certified", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    key = jax.random.key(config.seed)
    for name, setting in settings(config.divide):
        is_center = isinstance(setting, CenterConfig)
        model = encoder if is_center else nearest
        smooth = center_smoothing if is_center else randomized_smoothing
        arguments = dict(config=setting, batch_size=batch_size)
        if setting.bound in ("union", "betting"):  # compiling would be most of a short run's time
            dict(smooth(model, images[:1], key, **arguments))
        start = time.monotonic()
        certificates = dict(smooth(model, images, key, **arguments)).values()
        seconds = time.monotonic() - start
        size = [c.eps_out if is_center else c.radius for c in certificates]
        given = [s for s, c in zip(size, certificates) if not c.abstained]
        table.add_row(
            name,
            f"{np.mean([c.num_drawn for c in certificates]):,.0f}",
            f"{seconds / len(images):.1f}",
            f"{len(given)}/{len(images)}",
            f"{np.mean(given):.4f}" if given else "",
        )
        command.console.print(f"{name}: {seconds:.0f} s", highlight=False)
    command.console.print(table)


def encode(encoder, images):
    """Representations; a function object that stays the same."""
    return encoder(images)


if __name__ == "__main__":
    command.run(main, Config)
