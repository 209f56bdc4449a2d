"""Ways to make an encoder robust, side by side at equal gradient steps: `ur-jax compare-training`.

    python experiments/compare_training.py --images folder:cifar10/train \\
        --test-images folder:cifar10/test --workdir runs/methods

Fine-tunes encoder "demo" by each way on the same images, as often, under the same attack inside
(`ur-jax train`), then measures each encoder on test images that nothing was trained or chosen on:

- probe kept: top-1 of the linear probe that was trained on the clean features of "demo", read on
  the tuned encoder. That is what fare and lore are for: what stands on it needs no change.
- probe anew: top-1 of one trained on the tuned encoder's features.
- the same two under attack: images on which no run of the strongest attack on the features
  (`attacks.strong`: label-free) makes the probe wrong.
- normalised distance and universal quantile of the farthest that any of these runs moves a
  representation, in units of the encoder's own distances.
- clean drift: |f(x) - f0(x)|^2 / |f0(x)|^2 of clean images, the median; lore bounds it by rho.

Brackets are 95 % intervals over the test images. Writes WORKDIR/training/NAME, WORKDIR/probes/NAME,
WORKDIR/measured/NAME.json and WORKDIR/methods.md; the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ur_jax import data, metrics, runs
from ur_jax.attacks import AttackConfig, StrongConfig, strong
from ur_jax.checks import check_whole
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.jobs.probe import Probe
from ur_jax.jobs.progress import console
from ur_jax.jobs.recipes import recipe
from ur_jax.probes.checkpoint import restore_probe
from ur_jax.probes.linear import ProbeConfig
from ur_jax.stats.intervals import Estimate, median_interval, proportion_interval
from ur_jax.typed import check_types

_AT_ONCE = 250
MEASURES = {
    "kept": "probe kept, clean",
    "kept_attacked": "probe kept, strongest attack",
    "anew": "probe anew, clean",
    "anew_attacked": "probe anew, strongest attack",
    "normalised_distance": "normalised distance",
    "universal_quantile": "universal quantile",
    "drift": "clean drift",
}
"""What is measured, in the order of the table."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Which ways, on how many images."""

    images: str = tyro.MISSING
    """Image spec of the training, with labels for the probes."""
    test_images: str = tyro.MISSING
    """Image spec of the test images."""
    workdir: Path = tyro.MISSING
    """Folder of the results; a run that stopped there goes on."""
    methods: tuple[str, ...] = ("untargeted", "targeted", "loss", "fare", "lore", "simclip")
    """Attacks of MoCo v2, and fare, lore, simclip; lore@0.02 with another rho."""
    num_train: int = 4000
    """Evenly spaced training images of the fine-tuning."""
    num_epochs: int = 4
    batch_size: int = 64
    adversary: AttackConfig = AttackConfig(eps=0.05, step_size=0.02, num_steps=3)
    """The attack inside training."""
    num_probe: int = 10_000
    """Evenly spaced training images of the probes."""
    num_test: int = 2000
    """Evenly spaced test images of the clean accuracy."""
    num_attacked: int = 128
    """Evenly spaced test images that are attacked."""
    strongest: StrongConfig = StrongConfig(eps=0.05, budget=25, num_restarts=1)
    """The attack that measures."""
    seed: int = 0
    """Of every random draw."""

    def __post_init__(self):
        check_types(self, but=(tyro.MISSING,))
        check_whole(self, "num_train", "num_epochs", "batch_size", "num_probe", "num_test")
        check_whole(self, "num_attacked", least=2)
        check_whole(self, "seed", least=0)
        for name in self.methods:
            recipe(name)  # raises for an unknown one


def main(config: Config) -> int:
    """Trains and measures what is not there yet, and writes the table."""
    for name in config.methods:
        console.rule(f"training: {name}")
        training(config, name).run(config.workdir / "training" / name, plots=False)
    found = {}
    for name in ("demo", *config.methods):
        console.rule(f"measuring: {name}")
        found[name] = measured(config, name)
    text = table(found)
    with runs.atomic_path(config.workdir / "methods.md") as temporary:
        temporary.write_text(text + "\n")
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def training(config: Config, name: str):
    """The fine-tuning by one way."""
    return dataclasses.replace(
        recipe(name),
        images=config.images,
        num_images=config.num_train,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        adversary=config.adversary,
        seed=config.seed,
    )


def measured(config: Config, name: str) -> dict[str, Estimate]:
    """{measure: its estimate} of one encoder; from its file if that is there, of these settings."""
    place = "demo" if name == "demo" else str(config.workdir / "training" / name / "encoder")
    encoder = loading.load_encoder(place, representation="features")
    asked = ("num_probe", "num_test", "num_attacked", "seed")
    identity = {
        "weights_sha256": loading.weights_hash(encoder),
        "images": [data.open_images(s).content_hash for s in (config.images, config.test_images)],
        "strongest": dataclasses.asdict(config.strongest),
        **{field: getattr(config, field) for field in asked},
    }
    path = config.workdir / "measured" / f"{name}.json"
    if path.exists():
        known = runs.read_json(path)
        if known["identity"] == identity:
            return {key: _read(*values) for key, values in known["measures"].items()}
    kept, anew = (_probe(config, *pair) for pair in (("demo", "demo"), (name, place)))
    values = dict(_measures(config, encoder, {"kept": kept, "anew": anew}))
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, {"identity": identity, "measures": values})
    return values


def _read(value: float, low: float | None, high: float | None, n: int) -> Estimate:
    """An estimate from a file, which has no infinite ends of intervals."""
    return Estimate(value, -math.inf if low is None else low, math.inf if high is None else high, n)


class _Linear(NamedTuple):
    """A linear probe, in NumPy."""

    kernel: np.ndarray
    bias: np.ndarray

    def hits(self, representations: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether each representation (...,D) is of its label's class."""
        return np.argmax(representations @ self.kernel + self.bias, axis=-1) == labels


def _probe(config: Config, name: str, place: str) -> _Linear:
    """A probe on an encoder's clean features, trained if it is not there yet."""
    out = config.workdir / "probes" / name
    job = Probe(
        encoder=place, images=config.images, test_images=config.test_images, cached=True,
        num_images=config.num_probe, num_test_images=config.num_test, seed=config.seed,
        # Chosen for "demo" on held-out training images, see experiments/README.md.
        views=data.ViewConfig(augment=False),
        training=ProbeConfig(learning_rate=0.1, batch_norm=True),
    )  # fmt: skip
    job.run(out, plots=False)
    encoder = loading.load_encoder(place, representation="features")
    trained, _ = restore_probe(out / "probe", encoder)
    return _Linear(np.asarray(trained["kernel"]), np.asarray(trained["bias"]))


def _measures(
    config: Config, encoder: Encoder, probes: dict[str, _Linear]
) -> Iterator[tuple[str, Estimate]]:
    """Each measure of an encoder."""
    clean, labels, _ = _represented(config, encoder, config.num_test)
    for name, probe in probes.items():
        yield name, proportion_interval(int(probe.hits(clean, labels).sum()), len(labels))
    before, _, _ = _represented(config, loading.load_encoder("demo", representation="features"),
                                config.num_test)  # fmt: skip
    drift = np.square(clean - before).sum(1) / np.square(before).sum(1)
    yield "drift", median_interval(drift)
    distribution = metrics.distance_distribution(jnp.asarray(clean), jax.random.key(config.seed))
    _, labels, images = _represented(config, encoder, config.num_attacked)
    found = strong(encoder, images, jax.random.key(config.seed), config=config.strongest)
    for name, probe in probes.items():
        each = np.concatenate([found.each, found.clean[:, None]], axis=1)  # nothing but a run, too
        holds = probe.hits(np.asarray(each), labels[:, None]).all(axis=1)
        yield f"{name}_attacked", proportion_interval(int(holds.sum()), len(labels))
    far = np.asarray(found.distance, np.float64)
    yield "normalised_distance", median_interval(far / float(distribution.median))
    shares = metrics.universal_quantile(distribution, found.distance)
    yield "universal_quantile", median_interval(shares)


def _represented(config: Config, encoder: Encoder, number: int):
    """Clean representations (N,D), labels (N,) and images of evenly spaced test images."""
    source = data.open_images(config.test_images)
    indices = data.evenly_spaced(len(source), number)
    decoded = data.load_uint8(
        source, indices, input_size=encoder.input_size, preparation=encoder.preparation
    )
    images = jnp.asarray(decoded.images.astype(np.float32) / np.float32(255.0))
    represent = jax.jit(lambda encoder, images: encoder(images))
    parts = [
        np.asarray(represent(encoder, images[i : i + _AT_ONCE]))
        for i in range(0, len(images), _AT_ONCE)
    ]
    return np.concatenate(parts), np.asarray(decoded.labels), images


def table(found: dict[str, dict[str, Any]]) -> str:
    """The measures of each encoder as a table in Markdown."""
    shown = lambda e: f"{e.value:.3f} ({e.low:.3f}-{e.high:.3f})"
    lines = [f"| encoder | {' | '.join(MEASURES.values())} |", "| --- " * (len(MEASURES) + 1) + "|"]
    for name, values in found.items():
        lines.append(f"| {name} | {' | '.join(shown(values[key]) for key in MEASURES)} |")
    return "\n".join(lines)
