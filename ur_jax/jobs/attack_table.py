"""What each attack finds at which cost, on one page: `ur-jax attack-table`.

    python experiments/attack_table.py --encoders demo demo-robust --images demo \\
        --csv runs/attacks.csv

Attacks the same images of each encoder at each radius (linf) by the paper's steps, by steps of
eps/10, by momentum, by APGD on every objective, by Square, and takes the worst on each image
(`strong`). Beside these: one perturbation for all images, made on those of the bank that are not
attacked; APGD through random shifts (its images are measured as they are); APGD made on each of
the other encoders, and on all of them at once, if they look at the same pixels; and a patch, whose
ball is all of [0,1]. Prints a row for each: median l2 distance, universal quantile, breakaway risk,
top-1 accuracy, what it cost; seconds at the first radius include compiling. Rows are written to
--csv as they are finished; the same command again computes only those that are missing.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ur_jax import data, metrics, runs
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
from ur_jax.checks import check_whole
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError, unknown_name
from ur_jax.jobs.progress import console
from ur_jax.metrics import DistanceDistribution
from ur_jax.typed import check_types
from ur_jax.types import Array

COLUMNS = (
    *("encoder", "eps", "attack", "median_distance", "universal_quantile", "breakaway_risk"),
    *("top_1_accuracy", "gradient_steps", "queries", "seconds"),
)
_CLEAN_AT_ONCE = 128
_UNIVERSAL_BATCH, _EOT_SAMPLES = 32, 4
_MADE_ON, _ALL = "APGD, made on ", "APGD, made on all"
_UNIVERSAL, _SHIFTS = "one for all", "APGD, through shifts"


@dataclasses.dataclass(frozen=True)
class Config:
    """Which encoders, on which images."""

    encoders: tuple[str, ...] = ("demo", "demo-robust")
    """Checkpoint directories, encoders that ship, or functions that make one."""
    images: str = tyro.MISSING
    """Image spec: folder:PATH, tfds:NAME/SPLIT or demo."""
    eps: tuple[float, ...] = (0.01, 0.05, 0.1)
    """Radii, linf, in pixel units."""
    num_images: int = 64
    """Attacked ones, evenly spaced."""
    num_clean: int | None = None
    """Images of the bank, evenly spaced; all by default."""
    budget: int = 50
    """Gradient steps of a start of the strong attacks."""
    only: tuple[str, ...] = ()
    """Names of attacks; all by default."""
    csv: Path | None = None
    """File of the rows, as CSV."""
    patch: int = 8
    """Side of the patch, in pixels."""
    seed: int = 0
    """Of every random draw."""

    def __post_init__(self):
        check_types(self, but=(tyro.MISSING,))
        check_whole(self, "num_images", "budget", "patch")
        check_whole(self, "num_clean", optional=True)
        check_whole(self, "seed", least=0)
        for eps in self.eps:
            StrongConfig(eps, self.budget)


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack of the table.

    Attributes:
      config: at an eps.
      is_targeted: towards another image.
      needs_bank: looks at neighbours.
    """

    config: Callable[[float], AttackConfig]
    is_targeted: bool = False
    needs_bank: bool = False


def attacks(budget: int) -> dict[str, Attack]:
    """{name: attack}, weakest first; the paper's are at its own steps."""
    of = lambda steps, **more: lambda eps: AttackConfig(eps, num_steps=steps, **more)
    tenth = lambda rule: lambda eps: AttackConfig(eps, eps / 10, budget, rule=rule)
    return {
        "paper, 25 steps": Attack(of(25)),
        "paper, 50 steps": Attack(of(50)),
        "paper, 50 steps, 5 restarts": Attack(of(50, num_restarts=5)),
        "steps of eps/10": Attack(tenth("fixed")),
        "momentum, steps of eps/10": Attack(tenth("momentum")),
        "APGD, 8 steps": Attack(of(8, rule="apgd")),
        "APGD": Attack(of(budget, rule="apgd")),
        "APGD, twice the steps": Attack(of(2 * budget, rule="apgd")),
        "APGD, cosine": Attack(of(budget, rule="apgd", objective="cosine")),
        "APGD, neighbour": Attack(of(budget, rule="apgd", objective="neighbour"), needs_bank=True),
        "APGD, targeted": Attack(of(budget, rule="apgd"), is_targeted=True),
        "Square": Attack(of(10 * budget, rule="square")),
    }


def _known(config: Config, encoder: str) -> list[str]:
    """The names of all rows of an encoder."""
    others = [f"{_MADE_ON}{other}" for other in config.encoders if other != encoder]
    others += [_ALL] if others else []
    side = config.patch
    return [*attacks(config.budget), "strong", _UNIVERSAL, _SHIFTS, *others, f"patch {side}x{side}"]


def main(config: Config) -> int:
    """Computes the missing rows and prints all."""
    every = {name for encoder in config.encoders for name in _known(config, encoder)}
    for name in config.only:
        if name not in every:
            raise unknown_name("attack", name, sorted(every))
    done = _read(config.csv)
    rows: list[dict[str, Any]] = []
    for encoder in config.encoders:
        missing = [
            (eps, name)
            for eps in config.eps
            for name in _known(config, encoder)
            if (not config.only or name in config.only)
            and (not name.startswith("patch") or eps == config.eps[0])
            and (encoder, _shown_eps(eps, name), name) not in done
        ]
        rows += [row for key, row in done.items() if key[0] == encoder]
        if not missing:
            continue
        bench = _Bench.open(config, encoder)
        for eps, name in missing:
            if (row := bench.row(eps, name)) is None:
                continue
            rows.append({"encoder": encoder, **row})
            console.print(_line(rows[-1]), highlight=False, markup=False, soft_wrap=True)
            if config.csv is not None:
                _write(config.csv, [*(r for r in done.values() if r not in rows), *rows])
    console.print(table(rows), highlight=False, markup=False, soft_wrap=True)
    return 0


def _shown_eps(eps: float, name: str) -> str:
    """A patch may take any value: its radius is 1."""
    return "1" if name.startswith("patch") else f"{eps:g}"


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What every attack of an encoder is given."""

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
    def open(cls, config: Config, place: str) -> _Bench:
        """Loads the encoder and the images, and encodes the bank."""
        encoder = loading.load_encoder(place)
        source = data.open_images(config.images)
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
        same = lambda other: (
            (other.input_size, other.preparation)
            == (
                encoder.input_size,
                encoder.preparation,
            )
        )
        others = {name: loading.load_encoder(name) for name in config.encoders if name != place}
        for name in [name for name, other in others.items() if not same(other)]:
            console.print(f"{place} and {name} look at other pixels: nothing is transferred.")
            del others[name]
        places = {index: row for row, index in enumerate(of_bank)}
        own = np.array([places.get(index, -1) for index in chosen])
        images = jnp.asarray(load(chosen))
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        distribution = metrics.distance_distribution(jnp.asarray(bank), key)
        clean = represent(encoder, images)
        stream = load(apart) if len(apart) else np.zeros((0, *images.shape[1:]), np.float32)
        return cls(config, encoder, others, images, stream, clean, bank, own, distribution)

    def row(self, eps: float, name: str) -> dict[str, Any] | None:
        """The row of an attack, if it can be made; its seconds at the first radius include
        compiling."""
        key, budget = jax.random.key(self.config.seed), self.config.budget
        of_images = lambda images: self.encoder(images)[:, None]
        apgd = AttackConfig(eps, num_steps=budget, rule="apgd")
        steps, queries = budget, 0
        if name.startswith(_MADE_ON):
            if (source := self._source(name)) is None:
                return None
            run = lambda: of_images(u_pgd(source, self.images, key, config=apgd).images)
        elif name == _SHIFTS:
            steps *= _EOT_SAMPLES
            through = lambda: eot_pgd(
                _through_shifts, self.encoder, self.images, key, config=apgd,
                num_samples=_EOT_SAMPLES,
            )  # fmt: skip
            run = lambda: of_images(through().images)
        elif name == _UNIVERSAL:
            if not len(self.stream):
                raise UserError(
                    "Expected images in the bank that are not attacked: raise num_clean."
                )
            batches = (self._batch(step) for step in range(budget))
            one = AttackConfig(eps, eps / 10, budget)
            run = lambda: of_images(
                perturbed(
                    self.images, universal_perturbation(self.encoder, batches, key, config=one)
                )
            )
        elif name.startswith("patch"):
            side = self.config.patch
            patch = PatchConfig(height=side, width=side, num_steps=budget)
            run = lambda: patch_attack(
                self.encoder, self.images, key, config=patch
            ).representations[:, None]
        elif name == "strong":
            settings = StrongConfig(eps, self.config.budget, with_bank=True)
            bank = jnp.asarray(self.bank)
            run = lambda: strong(self.encoder, self.images, key, config=settings, bank=bank).each
            counts = {n: c.num_steps * settings.num_restarts for n, c in settings.members.items()}
            queries = counts.pop("square", 0)
            steps = sum(counts.values())
        else:
            attack = attacks(self.config.budget)[name]
            settings = attack.config(eps)
            target = jnp.roll(self.clean, -1, axis=0) if attack.is_targeted else None
            bank = jnp.asarray(self.bank) if attack.needs_bank else None
            run = lambda: u_pgd(
                self.encoder, self.images, key, config=settings, target=target, bank=bank
            ).representations[:, None]
            total = settings.num_steps * settings.num_restarts
            steps, queries = (0, total) if settings.rule == "square" else (total, 0)
        started = time.monotonic()
        found = jax.block_until_ready(run())
        seconds = time.monotonic() - started
        measured = self._measured(found)
        return {
            "eps": float(_shown_eps(eps, name)), "attack": name, **measured,
            "gradient_steps": steps, "queries": queries, "seconds": seconds,
        }  # fmt: skip

    def _source(self, name: str) -> Encoder | None:
        """The encoder that images are attacked on which are measured here."""
        if name != _ALL:
            return self.others.get(name.removeprefix(_MADE_ON))
        if not self.others:
            return None
        members = (self.encoder, *self.others.values())
        return ensemble(members, [_median_distance(member(self.images)) for member in members])

    def _batch(self, step: int) -> Array:
        """Images of the stream, over and over."""
        rows = np.arange(step * _UNIVERSAL_BATCH, (step + 1) * _UNIVERSAL_BATCH) % len(self.stream)
        return jnp.asarray(self.stream[rows])

    def _measured(self, found: Array) -> dict[str, float]:
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


def _median_distance(clean: Array) -> float:
    """Of the pairs of some representations."""
    far = jnp.linalg.norm(clean[:, None] - clean[None], axis=2)
    return float(np.median(np.asarray(far)[np.triu_indices(len(clean), 1)]))


def _shifted(image: Array, key: Array) -> Array:
    """An image moved by up to two pixels in each direction, its edge repeated."""
    rows, columns = jax.random.randint(key, (2,), 0, 5)
    padded = jnp.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
    return jax.lax.dynamic_slice(padded, (rows, columns, 0), image.shape)


_through_shifts = functools.partial(apply_transformed, transform=_shifted)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    heads = [name.replace("_", " ") for name in COLUMNS]
    return "\n".join([f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *map(_line, rows)])


def _cells(row: dict[str, Any]) -> Iterator[str]:
    """A row's cells, as text."""
    decimals = {"median_distance": 3, "universal_quantile": 3, "breakaway_risk": 3}
    decimals |= {"top_1_accuracy": 3, "seconds": 1}
    for name in COLUMNS:
        value = row[name]
        yield f"{float(value):.{decimals[name]}f}" if name in decimals else str(value)


def _line(row: dict[str, Any]) -> str:
    """A row of it."""
    return f"| {' | '.join(_cells(row))} |"


def _read(path: Path | None) -> dict[tuple[str, str, str], dict[str, Any]]:
    """{(encoder, eps, attack): row} of what is finished."""
    if path is None or not path.exists():
        return {}
    rows = list(csv.DictReader(path.read_text().splitlines()))
    if rows and tuple(rows[0]) != COLUMNS:
        raise UserError(f"Expected a file of this command as --csv, got {path}; give another one.")
    return {(row["encoder"], f"{float(row['eps']):g}", row["attack"]): row for row in rows}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes all rows, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with runs.atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
