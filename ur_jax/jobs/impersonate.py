"""Impersonation: images of one group of classes are attacked towards images of another, without
labels, and a probe on the attacked representation says whether they pass for it.

`attack` is pure; a `Job` wires it to images, devices and a run's folder, part by part as
`evaluation` does, so that a killed run resumes and ends with the same numbers.

Reference: Petrov & Kwiatkowska 2022 (arXiv:2210.04076), section 5.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax import devices
from ur_jax.attacks import AttackConfig, random_start, u_pgd
from ur_jax.certify import Classifier
from ur_jax.data import ImageBatch, ImageSource, evenly_spaced, image_batches
from ur_jax.devices import hosts
from ur_jax.distances import distance
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError, unknown_name
from ur_jax.jobs.label_free import Progress, part_indices, run_stage
from ur_jax.probes import linear
from ur_jax.runs import Run, write_table
from ur_jax.stats.intervals import Estimate, proportion_interval
from ur_jax.types import Array

_NUM_SHOWN = 4  # images in the grid, of each direction


@dataclasses.dataclass(frozen=True)
class ImpersonationConfig:
    """The attack; the defaults are the paper's.

    Attributes:
      eps: radius of the ball, linf, pixel units, > 0.
      step_size: of targeted U-PGD, > 0.
      read_at: steps at which success is read, increasing, >= 1.
      moving_ball: restart the attack around the already attacked image at each read-out, as the
        published code does (departure 3): the whole perturbation can exceed eps.
      num_images: attacked at most in each direction, evenly spaced among those that the probe
        classifies correctly; None for all.
      batch_size: images per batch, over all devices, >= 1.
      seed: of the random starts and of the pairs.

    Raises:
      ValueError: for a value out of range.
    """

    eps: float = 0.10
    step_size: float = 0.01
    read_at: tuple[int, ...] = (3, 5, 10, 20, 30, 40, 50)
    moving_ball: bool = False
    num_images: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        steps = (0, *self.read_at)
        if not self.read_at or any(b <= a for a, b in zip(steps, steps[1:])):
            raise UserError(f"Expected increasing read_at, from 1 on, got {self.read_at}.")
        for field in ("num_images", "batch_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"Expected {field} >= 1, got {value}.")
        self.one_step()

    def one_step(self) -> AttackConfig:
        """A step of the attack."""
        return AttackConfig(eps=self.eps, step_size=self.step_size, num_steps=1)


class Group(NamedTuple):
    """A group of classes.

    Attributes:
      name: for tables.
      labels: of the images that belong to it, in the images' own classes.
      classes: of the probe that count as it.
    """

    name: str
    labels: tuple[int, ...]
    classes: tuple[int, ...]


class Success(NamedTuple):
    """Share of images that pass for the other group: direction "a -> b" or "both", step."""

    direction: str
    step: int
    estimate: Estimate


def make_group(
    names: Sequence[str],
    image_classes: Sequence[str],
    probe_classes: Sequence[str],
    index_range: tuple[int, int] | None = None,
) -> Group:
    """Finds the classes of a group, whatever the case of their names.

    Args:
      names: of the images' classes (sub-folders), and of the probe's unless `index_range` is given.
      image_classes: all names of the images' classes.
      probe_classes: all names of the probe's classes; may be empty with `index_range`.
      index_range: first and last of the probe's classes that count, e.g. (151, 274) for ImageNet's
        dogs.

    Raises:
      ValueError: for an unknown name, or a range that is empty or outside the probe's classes.
    """
    if not names:
        raise UserError("Expected at least one class name in each group, got none.")

    def find(kind, known):
        places = {name.casefold(): place for place, name in enumerate(known)}
        for name in names:
            if name.casefold() not in places:
                raise unknown_name(kind, name, known)
        return tuple(places[name.casefold()] for name in names)

    labels = find("class of the images", image_classes)
    if index_range is None:
        return Group(" or ".join(names), labels, find("class of the probe", probe_classes))
    first, last = index_range
    if not 0 <= first <= last or (probe_classes and last >= len(probe_classes)):
        raise UserError(
            f"Expected first and last of the probe's classes 0 to {len(probe_classes) - 1} for "
            f"{' or '.join(names)}, got {first} and {last}."
        )
    return Group(" or ".join(names), labels, tuple(range(first, last + 1)))


def attack(
    encoder: Encoder, images: Array, keys: Array, target: Array, *, config: ImpersonationConfig
) -> Iterator[Array]:
    """Targeted U-PGD, read at several steps: one run in one ball around the originals.

    The steps after the random start are those of `u_pgd` with as many; reading it changes nothing.
    With `moving_ball`, every stretch between two readings is an attack of its own, with its own
    random start, around the image that the last one left.

    Args:
      encoder: the encoder that is attacked.
      images: originals (B,H,W,3) float32 in [0,1].
      keys: a key per image (B,).
      target: representations (B,D) to move towards.
      config: the attack; one compilation for all readings.

    Yields:
      The attacked images (B,H,W,3) at each of `config.read_at`.
    """
    attacked, done = images, 0
    for number, step in enumerate(config.read_at):
        centre = attacked if config.moving_ball else images
        fresh = config.moving_ball or number == 0
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number) if number else keys
        attacked = _advance(
            encoder, centre, attacked, own, target, fresh, step - done, config.one_step()
        )
        done = step
        yield attacked


@functools.partial(jax.jit, static_argnames="config")
def _advance(encoder, centre, attacked, keys, target, fresh, num_steps, config) -> Array:
    """`num_steps` further steps in the ball around `centre`, from a random start if `fresh`."""
    attacked = jnp.where(fresh, random_start(centre, keys, config=config), attacked)

    # What `u_pgd` records of a step is not used, and the compiler removes it.
    def step(_, x):
        return u_pgd(encoder, centre, keys, config=config, target=target, start=x).images

    return jax.lax.fori_loop(0, num_steps, step, attacked)


@dataclasses.dataclass(frozen=True)
class Job:
    """An impersonation experiment, in a run's folder.

    Attributes:
      encoder: the encoder that is attacked, e.g. in the representation "paper".
      classifier: the probe, on its own representation of the same network.
      source: images, from `data.open_images`.
      groups: the two groups.
      run: the folder, from `records.open_run`.
      config: the attack.
      mesh: this host's devices, from `devices.data_mesh`; all by default.
      num_workers: processes that load images.
      progress: shows progress.
      host: number of this host. On several hosts all make the same calls, in the same order, and
        get the same results: batches are divided over them, and the first one writes the table.
      num_hosts: how many there are.

    Raises:
      ValueError: for groups that share a class, or a batch that does not divide over the devices.
    """

    encoder: Encoder
    classifier: Classifier
    source: ImageSource
    groups: tuple[Group, Group]
    run: Run
    config: ImpersonationConfig = ImpersonationConfig()
    mesh: Mesh = dataclasses.field(default_factory=devices.data_mesh)
    num_workers: int = 0
    progress: Progress = lambda iterable, description, total: iterable
    host: int = 0
    num_hosts: int = 1

    def __post_init__(self):
        check_groups(self.groups, self.classifier.bias.shape[0])
        devices.check_divisible(self.config.batch_size, self.mesh)

    def measure(self) -> tuple[list[Success], dict[str, Estimate]]:
        """Attacks the images; writes `impersonations.parquet`, a row per image and step.

        Returns:
          (success by direction and step, {group: share of its images that the probe classifies
          correctly, into the group}).

        Raises:
          ValueError: if a group has no image, or none that the probe classifies correctly.
        """
        correct, clean = [], {}
        for place, group in enumerate(self.groups):
            rows = self._classify(place)
            hits = np.isin(rows["predicted"], group.classes)
            clean[group.name] = proportion_interval(int(hits.sum()), len(hits))
            if not hits.any():
                raise UserError(
                    f"The probe classifies none of {len(hits)} images of {group.name!r} into that "
                    "group, and only correctly classified images are attacked. Check the group's "
                    "classes, or train a better probe."
                )
            correct.append(rows["index"][hits])
        outcomes, tables = {}, []
        for place, (own, other) in enumerate((self.groups, self.groups[::-1])):
            rows = self._attack(place, correct[place], correct[1 - place])
            success = np.isin(rows["predicted"], other.classes)
            direction = f"{own.name} -> {other.name}"
            outcomes[direction] = success
            tables.append(self._table(direction, rows, success))
        joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        if self.host == 0:
            write_table(self.run.path / "impersonations.parquet", joined)
        outcomes["both"] = np.concatenate(list(outcomes.values()))
        successes = [
            Success(
                direction,
                step,
                proportion_interval(int(success[:, column].sum()), len(success)),
            )
            for direction, success in outcomes.items()
            for column, step in enumerate(self.config.read_at)
        ]
        return successes, clean

    def gallery(self) -> dict[str, np.ndarray]:
        """The first images of each direction: "images", "targets" (S,H,W,3), "attacked" at each
        reading (S,R,H,W,3), and the probe's "success" (S,R), after `measure`."""
        shown = [self.run.read_parts(f"gallery_{place}") for place in (0, 1)]
        for place, other in enumerate(self.groups[::-1]):
            shown[place]["success"] = np.isin(shown[place].pop("predicted"), other.classes)
        return {name: np.concatenate([part[name] for part in shown]) for name in shown[0]}

    def unreadable(self) -> dict[str, str]:
        """{name: reason} of the images left out."""
        stages = [f"{stage}_{place}" for stage in ("clean", "attack") for place in (0, 1)]
        skipped = [self.run.read_parts(stage)["unreadable"] for stage in stages]
        return dict(sorted(map(tuple, np.concatenate(skipped).tolist())))

    def _classify(self, place: int) -> dict[str, np.ndarray]:
        """Predicted classes of all images of a group."""
        group, source = self.groups[place], self.source
        chosen = [i for i in range(len(source)) if source.label(i) in group.labels]
        if not chosen:
            raise UserError(f"Expected images of {group.name!r} in {source.spec!r}, found none.")

        def compute(batch):
            return {"predicted": self._predict(devices.shard(self.mesh, batch.images))}

        stage, title = f"clean_{place}", f"{group.name}: clean images"
        self._stage(stage, title, compute, np.array(chosen))
        rows = self.run.read_parts(stage)
        if not len(rows["index"]):
            raise UserError(f"None of the {len(chosen)} images of {group.name!r} could be read.")
        return rows

    def _attack(self, place: int, own: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray]:
        """Attacks some images of a group towards the other's: values (N,R) at each reading."""
        config = self.config
        own = own[evenly_spaced(len(own), min(len(own), config.num_images or len(own)))]
        order = np.random.default_rng([config.seed, place]).permutation(len(others))
        targets = others[order[np.arange(len(own)) % len(others)]]
        base = jax.random.fold_in(jax.random.key(config.seed), place)
        encoder = devices.replicate(self.mesh, self.encoder)

        def compute(batch, target):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(base, batch.indices.astype(np.uint32))
            images, aims, keys = devices.shard(self.mesh, (batch.images, target.images, keys))
            towards = _encode(encoder, aims)
            reads, pictures = [], []
            for attacked in attack(encoder, images, keys, towards, config=config):
                far, size = _describe(encoder, images, attacked, towards)
                reads.append((self._predict(attacked), far, size))
                pictures.append(attacked[:_NUM_SHOWN])
            predicted, far, size = (np.stack(jax.device_get(x), axis=1) for x in zip(*reads))
            if batch.indices[0] == own[0]:
                shown = np.flatnonzero((batch.mask & target.mask)[:_NUM_SHOWN])
                pictures = np.stack(jax.device_get(pictures), axis=1)
                self.run.write_part(
                    f"gallery_{place}",
                    0,
                    {
                        "images": batch.images[shown],
                        "targets": target.images[shown],
                        "attacked": pictures[shown],
                        "predicted": predicted[shown],
                    },
                )
            return {
                "name": np.array(batch.names),
                "target": target.indices,
                "predicted": predicted,
                "distance": far,
                "perturb_linf": size,
            }

        title = f"{self.groups[place].name} -> {self.groups[1 - place].name}"
        self._stage(f"attack_{place}", title, compute, own, targets)
        return self.run.read_parts(f"attack_{place}")

    def _table(
        self, direction: str, rows: Mapping[str, np.ndarray], success: np.ndarray
    ) -> dict[str, np.ndarray]:
        """One row per image and reading."""
        num_images, num_reads = success.shape
        repeated = {name: np.repeat(rows[name], num_reads) for name in ("index", "name", "target")}
        read = {name: rows[name].ravel() for name in ("predicted", "distance", "perturb_linf")}
        return {
            "direction": np.full(num_images * num_reads, direction),
            **repeated,
            "step": np.tile(self.config.read_at, num_images),
            **read,
            "success": success.ravel(),
        }

    def _predict(self, images: Array) -> Array:
        """The probe's classes (B,)."""
        labels = jnp.zeros(len(images), jnp.int32)
        return linear.classify(self._placed_classifier, images, labels)[0]

    @functools.cached_property
    def _placed_classifier(self) -> Classifier:
        """The probe on every device."""
        return devices.replicate(self.mesh, self.classifier)

    def _stage(self, stage: str, title: str, compute: Any, *indices: np.ndarray) -> None:
        """Computes the missing parts of a stage, on all hosts."""
        size = self.config.batch_size
        batches_of = lambda numbers: (
            self._batches(part_indices(each, numbers, size)) for each in indices
        )
        with hosts.before_merge(self.num_hosts):
            run_stage(
                self.run,
                stage,
                math.ceil(len(indices[0]) / size),
                batches_of,
                compute,
                host=self.host,
                num_hosts=self.num_hosts,
                title=title,
                progress=self.progress,
            )

    def _batches(self, indices: np.ndarray) -> Iterator[ImageBatch]:
        """Batches of whole images, prepared as the encoder wants them."""
        return image_batches(
            self.source,
            indices,
            input_size=self.encoder.input_size,
            preparation=self.encoder.preparation,
            batch_size=self.config.batch_size,
            num_workers=self.num_workers,
        )


def check_groups(groups: tuple[Group, Group], num_classes: int) -> None:
    """Raises ValueError if two groups share a class, or have one that the probe lacks."""
    first, second = groups
    if set(first.classes) & set(second.classes) or set(first.labels) & set(second.labels):
        raise UserError(f"Expected two groups without a common class, got {first} and {second}.")
    largest = max((*first.classes, *second.classes))
    if largest >= num_classes:
        raise UserError(f"Expected classes of the probe, 0 to {num_classes - 1}, got {largest}.")


@jax.jit
def _encode(encoder: Encoder, images: Array) -> Array:
    """The encoder, compiled."""
    return encoder(images)


@jax.jit
def _describe(
    encoder: Encoder, images: Array, attacked: Array, target: Array
) -> tuple[Array, Array]:
    """l2 distances to the targets and linf norms of the perturbations, (B,) each."""
    far = distance(encoder(attacked), target, divergence="l2")
    return far, jnp.abs(attacked - images).max((1, 2, 3))
