"""The attacks of `ur-jax attack-table`, each made on the same images of an encoder and measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax import data, metrics
from ur_jax.attacks import (
    AttackConfig,
    PatchConfig,
    StrongConfig,
    apply_transformed,
    ensemble,
    eot_pgd,
    patch_attack,
    perturbed,
    strong,
    u_pgd,
    universal_perturbation,
)
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.metrics import DistanceDistribution
from ur_jax.types import Array

if TYPE_CHECKING:
    from ur_jax.jobs.attack_table import Config

_CLEAN_AT_ONCE = 128
_UNIVERSAL_BATCH, _EOT_SAMPLES = 32, 4


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every attack on an encoder is given.

    Attributes:
      config: of the command.
      encoder: what is attacked.
      others: {name: encoder} that look at the same pixels.
      images: attacked ones (B,H,W,3) in [0,1].
      stream: images of the bank that are not attacked (N,H,W,3).
      clean: representations of the attacked images (B,D).
      bank: of the bank (M,D).
      own: row of each attacked image in the bank (B,), -1 where there is none.
      distribution: of the bank's distances.
    """

    config: Config
    encoder: Encoder
    others: dict[str, Encoder]
    images: Array
    stream: np.ndarray
    clean: Array
    bank: np.ndarray
    own: np.ndarray
    distribution: DistanceDistribution

    @classmethod
    def open(cls, config: Config, place: str) -> Bench:
        """Loads the encoders and the images, and encodes the bank."""
        encoder, source = loading.load_encoder(place), data.open_images(config.images)
        total = len(source)
        chosen = data.evenly_spaced(total, config.num_images, what="num_images")
        of_bank = data.evenly_spaced(total, config.num_clean or total, what="num_clean")
        load = lambda indices: data.load_uint8(
            source, indices, input_size=encoder.input_size, preparation=encoder.preparation
        ).images.astype(np.float32) / np.float32(255.0)  # fmt: skip
        represent = jax.jit(lambda encoder, images: encoder(images))
        bank = np.concatenate([
            represent(encoder, load(of_bank[start : start + _CLEAN_AT_ONCE]))
            for start in range(0, len(of_bank), _CLEAN_AT_ONCE)
        ])  # fmt: skip
        apart = np.setdiff1d(of_bank, chosen)[: 4 * _UNIVERSAL_BATCH]
        rows = {index: row for row, index in enumerate(of_bank)}
        attacked = jnp.asarray(load(chosen))
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        pixels = lambda encoder: (encoder.input_size, encoder.preparation)
        loaded = {name: loading.load_encoder(name) for name in config.others(place)}
        return cls(
            config=config,
            encoder=encoder,
            others={k: other for k, other in loaded.items() if pixels(other) == pixels(encoder)},
            images=attacked,
            stream=load(apart) if len(apart) else np.zeros((0, *attacked.shape[1:]), np.float32),
            clean=represent(encoder, attacked),
            bank=bank,
            own=np.array([rows.get(index, -1) for index in chosen]),
            distribution=metrics.distance_distribution(jnp.asarray(bank), key),
        )

    @property
    def key(self) -> Array:
        """Of an attack's draws."""
        return jax.random.key(self.config.seed)

    def of(self, images: Array) -> Array:
        """Representations (B,1,D) of images that were made by one attack."""
        return self.encoder(images)[:, None]

    def measured(self, found: Array) -> dict[str, float]:
        """The numbers of the worst of some representations (B,R,D) of each image."""
        num_runs = found.shape[1]
        far = jnp.linalg.norm(found - self.clean[:, None], axis=2).max(1)
        ranks = metrics.neighbour_ranks(
            found.reshape(-1, found.shape[2]),
            jnp.repeat(self.clean, num_runs, axis=0),
            self.bank,
            own_index=np.repeat(self.own, num_runs),
        )
        rank = jnp.reshape(ranks.rank, (-1, num_runs)).max(1)
        worst = metrics.Ranks(rank, jnp.reshape(ranks.compared, (-1, num_runs))[:, 0])
        mean = lambda values: float(np.mean(np.asarray(values)))
        return {
            "median_distance": float(np.median(far)),
            "universal_quantile": float(
                np.median(metrics.universal_quantile(self.distribution, far))
            ),
            "breakaway_risk": mean(metrics.breakaway_risk(worst)),
            "top_1_accuracy": mean(metrics.nearest_neighbour_hits(worst, k=1)),
        }


class Made(NamedTuple):
    """An attack that can be run.

    Attributes:
      run: gives representations (B,R,D) of R attacks on each image, the worst of which counts.
      gradient_steps: of an image.
      queries: of an image, without a gradient.
    """

    run: Callable[[], Array]
    gradient_steps: int
    queries: int = 0


class Kind(NamedTuple):
    """A row of the table.

    Attributes:
      make: from the bench and a radius.
      takes_radius: False for what may take any value in [0,1].
    """

    make: Callable[[Bench, float], Made]
    takes_radius: bool = True


def kinds(config: Config, others: Sequence[str]) -> dict[str, Kind]:
    """{name: kind}, of one encoder weakest first; the paper's are at its own steps.

    Args:
      config: of the command.
      others: names of the other encoders, on which attacks are made too.
    """
    budget, side = config.budget, config.patch
    of = lambda steps, **more: lambda eps: AttackConfig(eps, num_steps=steps, **more)
    tenth = lambda rule: lambda eps: AttackConfig(eps, eps / 10, budget, rule=rule)
    apgd = functools.partial(of, rule="apgd")
    found = {
        "paper, 25 steps": _gradient(of(25)),
        "paper, 50 steps": _gradient(of(50)),
        "paper, 50 steps, 5 restarts": _gradient(of(50, num_restarts=5)),
        "steps of eps/10": _gradient(tenth("fixed")),
        "momentum, steps of eps/10": _gradient(tenth("momentum")),
        "APGD, 8 steps": _gradient(apgd(8)),
        "APGD": _gradient(apgd(budget)),
        "APGD, twice the steps": _gradient(apgd(2 * budget)),
        "APGD, cosine": _gradient(apgd(budget, objective="cosine")),
        "APGD, neighbour": _gradient(apgd(budget, objective="neighbour"), needs_bank=True),
        "APGD, targeted": _gradient(apgd(budget), is_targeted=True),
        "Square": _gradient(of(10 * budget, rule="square")),
        "strong": Kind(_strong),
        "one for all": Kind(_one_for_all),
        "APGD, through shifts": Kind(_through_shifts),
        **{f"APGD, made on {other}": _transferred(other) for other in others},
    }
    if others:
        found["APGD, made on all"] = Kind(_made_on_all)
    return {**found, f"patch {side}x{side}": Kind(_patch, takes_radius=False)}


def _gradient(
    config: Callable[[float], AttackConfig], is_targeted: bool = False, needs_bank: bool = False
) -> Kind:
    """`u_pgd`, by its configuration at a radius."""

    def make(bench: Bench, eps: float) -> Made:
        settings = config(eps)
        target = jnp.roll(bench.clean, -1, axis=0) if is_targeted else None
        bank = jnp.asarray(bench.bank) if needs_bank else None
        run = lambda: u_pgd(
            bench.encoder, bench.images, bench.key, config=settings, target=target, bank=bank
        ).representations[:, None]
        total = settings.num_steps * settings.num_restarts
        return Made(run, 0, total) if settings.rule == "square" else Made(run, total)

    return Kind(make)


def _strong(bench: Bench, eps: float) -> Made:
    """The worst of all."""
    settings, bank = StrongConfig(eps, bench.config.budget, with_bank=True), jnp.asarray(bench.bank)
    run = lambda: strong(bench.encoder, bench.images, bench.key, config=settings, bank=bank).each
    steps = {k: c.num_steps * settings.num_restarts for k, c in settings.members.items()}
    queries = steps.pop("square", 0)
    return Made(run, sum(steps.values()), queries)


def _one_for_all(bench: Bench, eps: float) -> Made:
    """Made on images of the bank that are not attacked, over and over."""
    if not len(bench.stream):
        raise UserError("Expected images in the bank that are not attacked: raise num_clean.")
    budget, size = bench.config.budget, _UNIVERSAL_BATCH
    settings = AttackConfig(eps, eps / 10, budget)

    def run() -> Array:
        rows = np.arange(budget * size).reshape(budget, size) % len(bench.stream)
        batches = (jnp.asarray(bench.stream[each]) for each in rows)
        delta = universal_perturbation(bench.encoder, batches, bench.key, config=settings)
        return bench.of(perturbed(bench.images, delta))

    return Made(run, budget)


def _shifted(image: Array, key: Array) -> Array:
    """An image moved by up to two pixels in each direction, its edge repeated."""
    rows, columns = jax.random.randint(key, (2,), 0, 5)
    padded = jnp.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
    return jax.lax.dynamic_slice(padded, (rows, columns, 0), image.shape)


_shifts = functools.partial(apply_transformed, transform=_shifted)


def _through_shifts(bench: Bench, eps: float) -> Made:
    """Through random shifts; its images are measured as they are."""
    run = lambda: bench.of(
        eot_pgd(
            _shifts, bench.encoder, bench.images, bench.key, config=_apgd(bench, eps),
            num_samples=_EOT_SAMPLES,
        ).images
    )  # fmt: skip
    return Made(run, _EOT_SAMPLES * bench.config.budget)


def _apgd(bench: Bench, eps: float) -> AttackConfig:
    """The paper's objective by APGD."""
    return AttackConfig(eps, num_steps=bench.config.budget, rule="apgd")


def _made_on(bench: Bench, eps: float, source: Encoder) -> Made:
    """Attacks one encoder, measures another."""
    attacked = lambda: u_pgd(source, bench.images, bench.key, config=_apgd(bench, eps)).images
    return Made(lambda: bench.of(attacked()), bench.config.budget)


def _transferred(other: str) -> Kind:
    """Made on another encoder."""
    return Kind(lambda bench, eps: _made_on(bench, eps, bench.others[other]))


def _made_on_all(bench: Bench, eps: float) -> Made:
    """Made on all encoders at once, each over its median distance."""
    members = (bench.encoder, *bench.others.values())
    scales = [_median_distance(member(bench.images)) for member in members]
    return _made_on(bench, eps, ensemble(members, scales))


def _median_distance(clean: Array) -> float:
    """Of the pairs of some representations."""
    far = jnp.linalg.norm(clean[:, None] - clean[None], axis=2)
    return float(np.median(np.asarray(far)[np.triu_indices(len(clean), 1)]))


def _patch(bench: Bench, eps: float) -> Made:
    """A square of any values, at a random place of each image."""
    side, budget = bench.config.patch, bench.config.budget
    config = PatchConfig(height=side, width=side, num_steps=budget)
    run = lambda: patch_attack(bench.encoder, bench.images, bench.key, config=config)
    return Made(lambda: run().representations[:, None], budget)
