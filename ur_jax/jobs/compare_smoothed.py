"""Center smoothing beside the other smoothed encoders, all from one stream of noise per image.

    python experiments/compare_certificates.py --encoder demo --images demo --smoothed \\
        --num-images 32 --stream.out runs/smoothed

Part of `compare_certificates`. Every certificate and every eps_in is of the same samples. The first
few images are attacked as well: APGD in the l2 ball of the first eps_in on the mean of 64 samples
of common noise. How far the smoothed encoders then move is told beside what was certified. Images
that are finished stay in --stream.out, so that a run goes on, also with more of them.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

from ur_jax import data, metrics, runs
from ur_jax.certify import CosineConfig, GeometricMedianConfig, MeanConfig, certify_stream
from ur_jax.certify.joint import (
    MOVING,
    StreamCenterConfig,
    StreamConfig,
    attacked_image,
    movement,
    part_of,
)
from ur_jax.data import ImageSource
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.jobs import parts
from ur_jax.jobs.progress import console
from ur_jax.types import Key

_DRAWS, _STEPS, _SAMPLES = 64, 20, 2000
_DISTRIBUTION = 512

Found = Mapping[str, np.ndarray]
"""Of an image: {"METHOD/eps_out", "METHOD/eps_out_population", ...: by eps_in [J]}."""


@dataclasses.dataclass(frozen=True)
class Smoothed:
    """How the smoothed encoders are compared."""

    eps_in: tuple[float, ...] = (0.25, 0.125, 0.5)
    """l2 radii; sigma is 0.25."""
    n0: int = 10_000
    """Samples of the first stage."""
    n: int = 100_000
    """Samples that bound, and of which a user computes the smoothed encoder."""
    attacked: int = 4
    """Images to attack too, the first ones."""
    out: Path | None = None
    """Keeps finished images."""

    @property
    def configs(self) -> dict[str, StreamConfig]:
        """{method: settings}, of one stream."""
        shared = {"eps_in": self.eps_in, "n0": self.n0, "n": self.n, "m": self.n}
        return {
            "center": StreamCenterConfig(**shared),
            "geometric_median": GeometricMedianConfig(**shared),
            "mean": MeanConfig(**shared),
            "cosine": CosineConfig(**shared),
        }


def compare(
    settings: Smoothed, encoder: Encoder, source: ImageSource, num_images: int, seed: int,
    batch_size: int,
) -> Table:  # fmt: skip
    """Certifies, attacks a few, and makes the table.

    Args:
      settings: what to compare.
      encoder: the encoder.
      source: its images.
      num_images: evenly spaced subset of them.
      seed: of the noise.
      batch_size: samples per device and forward pass.
    """
    indices = data.evenly_spaced(len(source), num_images)
    identity = {
        "job": "compare-smoothed", "images": source.content_hash, "seed": seed,
        **loading.described(encoder),
        **{k: v for k, v in vars(settings).items() if k not in ("out", "attacked")},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = runs.open_run(settings.out or folder, identity)
        found = {}
        for place, (index, image) in enumerate(_images(encoder, source, indices)):
            stage = f"image-{index}"
            if not run.num_parts(stage):
                start = time.monotonic()
                one = certify_image(
                    settings, encoder, image, index, jax.random.key(seed), batch_size
                )
                run.write_part(stage, 0, one | {"seconds": np.array([time.monotonic() - start])})
                seconds = time.monotonic() - start
                console.print(f"image {index}: {seconds:.0f} s", highlight=False)
            if place < settings.attacked and not run.num_parts(f"attack-{index}"):
                key = jax.random.key(seed + 1)
                run.write_part(
                    f"attack-{index}", 0, attack(settings, encoder, image, key, batch_size)
                )
            found[index] = run.read_parts(stage)
            if run.num_parts(f"attack-{index}"):
                found[index] = found[index] | run.read_parts(f"attack-{index}")
        clean = np.concatenate([
            parts.encode(encoder, batch)
            for batch in _batches(encoder, source)
        ])  # fmt: skip
    return _table(settings, encoder, source, list(found.values()), clean)


def certify_image(
    settings: Smoothed, encoder: Encoder, image: np.ndarray, index: int, key: Key, batch_size: int
) -> dict[str, np.ndarray]:
    """The certificates of one image, of one stream."""
    together = {name: part_of(encoder, config) for name, config in settings.configs.items()}
    [(_, certificates)] = certify_stream(
        encoder, image[None], key, parts=together, indices=[index], batch_size=batch_size
    )
    found = {}
    for name, certificate in certificates.items():
        for field in ("eps_out", "eps_out_population", "cosine_population", "smoothing_error"):
            if hasattr(certificate, field):
                found[f"{name}/{field}"] = np.atleast_1d(getattr(certificate, field))[None]
    return found | {"samples": np.array([settings.n0 + settings.n])}


def attack(
    settings: Smoothed, encoder: Encoder, image: np.ndarray, key: Key, batch_size: int
) -> dict[str, np.ndarray]:
    """How far the smoothed encoders move under an attack within the first eps_in."""
    moved = attacked_image(
        encoder, image, key, config=settings.configs["mean"], draws=_DRAWS, num_steps=_STEPS
    )
    found = {}
    for name in MOVING:
        away = movement(
            encoder, image, moved, key, method=name, config=settings.configs[name], m=_SAMPLES,
            batch_size=batch_size,
        )  # fmt: skip
        found[f"{name}/moved"] = np.array([away])
    return found


def _images(
    encoder: Encoder, source: ImageSource, indices: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, image) of the readable ones."""
    batches = data.image_batches(
        source, indices, input_size=encoder.input_size, preparation=encoder.preparation,
        batch_size=8,
    )  # fmt: skip
    for batch in batches:
        for row in np.flatnonzero(batch.mask):
            yield int(batch.indices[row]), batch.images[row]


def _batches(encoder: Encoder, source: ImageSource) -> Iterator[np.ndarray]:
    """Images of the distance distribution."""
    indices = data.evenly_spaced(len(source), min(_DISTRIBUTION, len(source)))
    batches = data.image_batches(
        source, indices, input_size=encoder.input_size, preparation=encoder.preparation,
        batch_size=32,
    )  # fmt: skip
    for batch in batches:
        yield batch.images[batch.mask]


def _table(
    settings: Smoothed, encoder: Encoder, source: ImageSource, found: list[Found], clean: np.ndarray
) -> Table:
    """Medians over images, by method and eps_in."""
    distributions = {
        divergence: metrics.distance_distribution(
            jnp.asarray(clean), jax.random.key(0), divergence=divergence
        )
        for divergence in ("l2", "cosine")
    }
    samples = f"n0 {settings.n0:,}, n {settings.n:,}"
    title = f"{encoder.name} on {len(found)} images of {source.spec}, {samples}"
    caption = (
        "medians over images; population: eps_out of infinitely many samples, or the cosine; of "
        "center, times: how many times smaller than center's; moved: by an attack, and what was "
        "certified over it, medians of the attacked images"
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("certificate", "eps_in", "eps_out", "F", "of center", "population", "moved"):
        table.add_column(name, justify="left" if name == "certificate" else "right")
    for j, eps in enumerate(settings.eps_in):
        center = _median(found, "center/eps_out", j)
        for name in settings.configs:
            value = _median(found, f"{name}/eps_out", j)
            divergence = "cosine" if name == "cosine" else "l2"
            quantile = metrics.universal_quantile(
                distributions[divergence], jnp.asarray([value], jnp.float32), divergence=divergence
            )
            field = "cosine_population" if name == "cosine" else "eps_out_population"
            population = _median(found, f"{name}/{field}", j)
            moved = [
                (float(f[f"{name}/moved"][0]), float(f[f"{name}/eps_out"][0, 0]))
                for f in found
                if f"{name}/moved" in f
            ]
            table.add_row(
                name,
                f"{eps:g}",
                f"{value:.3f}",
                f"{float(np.asarray(quantile)[0]):.4f}",
                "" if name == "cosine" else f"{center / value:.2f} times",
                "" if np.isnan(population) else f"{population:.3f}",
                "" if j or not moved else _moved(moved),
            )
    seconds = np.concatenate([f["seconds"] for f in found])
    table.caption = f"{caption}; {np.median(seconds):.0f} s per image for all of them together"
    return table


def _median(found: list[Found], name: str, j: int) -> float:
    """Median over images; NaN where there is no such number."""
    values = [float(f[name][0, j]) for f in found if name in f]
    return float(np.median(values)) if values else float("nan")


def _moved(pairs: list[tuple[float, float]]) -> str:
    """How far it moved, and the ratio."""
    moved, certified = np.array(pairs).T
    return f"{np.median(moved):.2g} ({np.median(certified / moved):.2g} times)"
