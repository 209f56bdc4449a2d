"""Impersonation: do attacked cats pass for dogs, and dogs for cats? Attacked without labels.

    python experiments/impersonate.py --encoder demo --probe runs/standard/probe \\
        --images folder:cifar10/test --first cat --second dog --out runs/impersonate

Each image that the probe classifies correctly is attacked towards the representation of an image of
the other group (targeted U-PGD); it succeeds where the probe then puts it into that group. Groups
are classes by name, of the images (sub-folders, in any case) and of the probe; with --preset
imagenet the probe's groups are ImageNet's ranges, 281-293 for cats and 151-274 for dogs.

Writes to --out: `impersonations.parquet` (per image and step), `summary.json` (success by direction
and step, with 95 % intervals) and `impersonations.png`. A killed run resumes where it stopped.

Reference: Petrov & Kwiatkowska 2022 (arXiv:2210.04076), section 5.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from ur_jax import devices, runs
from ur_jax.attacks.impersonation import ImpersonationConfig, attack
from ur_jax.data import ImageBatch, check_batch_size, evenly_spaced, labels
from ur_jax.devices import hosts
from ur_jax.distances import distance
from ur_jax.encoders import checkpoints
from ur_jax.encoders.base import Encoder
from ur_jax.encoders.outputs import with_representation
from ur_jax.errors import NotFoundError, UserError
from ur_jax.jobs import parts
from ur_jax.jobs.base import Job, ProbeLike, Session, register
from ur_jax.probes import linear
from ur_jax.probes.checkpoint import identified, load_probe
from ur_jax.probes.classifier import Classifier
from ur_jax.runs.summary import Row, Summary
from ur_jax.stats.intervals import Estimate, proportion_interval
from ur_jax.types import Array, Values

_NUM_SHOWN = 4  # images in the grid, of each direction


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


@register("impersonate")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Impersonate(Job):
    """Impersonation: attacks from one group of classes towards another, judged by a probe."""

    not_identity = ("probe",)

    probe: ProbeLike = tyro.MISSING
    """Checkpoint directory of a linear probe on the same encoder, or class embeddings of a text
    encoder (classes.npy, with names in classes.json)."""
    first: tuple[str, ...] = ("cat",)
    """Classes of the first group."""
    second: tuple[str, ...] = ("dog",)
    """Classes of the second group."""
    first_range: tuple[int, int] | None = None
    """First and last of the probe's classes that count as the first group; by name if left out."""
    second_range: tuple[int, int] | None = None
    """The same of the second group."""
    class_map: tuple[str, ...] = ()
    """THEIRS=OURS each: classes of the images whose names differ from the probe's."""
    probe_representation: str = "features"
    """What the probe reads; --representation is what is attacked."""
    attack: tyro.conf.OmitArgPrefixes[ImpersonationConfig] = ImpersonationConfig()

    def __post_init__(self):
        super().__post_init__()
        labels.parse_map(self.class_map)

    @property
    def requires(self) -> dict[str, str]:
        return {} if isinstance(self.probe, str) else identified(self.classifier)

    @property
    def classifier(self) -> Classifier:
        """The probe, of a job that is `opened`."""
        assert isinstance(self.probe, Classifier), self.probe
        return self.probe

    @property
    def samples(self) -> int:
        number = self.attack.num_images or len(self.source()) // 2
        reads = self.attack.read_at
        steps = sum(reads) if self.attack.is_read_apart else max(reads)
        return 2 * number * (3 * self.attack.num_restarts * steps + 2)

    def opened(self) -> Self:
        """With its probe loaded too, if that is there: a benchmark plans before it is."""
        if self.probe is tyro.MISSING:
            raise UserError("Expected a probe for impersonate, got none.")
        job = super().opened()
        if not isinstance(job.probe, str) or not checkpoints.is_saved(job.probe):
            return job
        reader = with_representation(job.model, job.probe_representation)
        return dataclasses.replace(job, probe=load_probe(job.probe, reader))

    def check(self, mesh: Mesh) -> None:
        if isinstance(self.probe, str):
            raise NotFoundError(f"There is no probe at {self.probe}; check the path, or train one.")
        theirs, ours = self.source().class_names, self.classifier.class_names
        for name, other in labels.parse_map(self.class_map).items():
            labels.find_class("class of the images in the class map", name, theirs)
            labels.find_class("class of the probe", other, ours)
        check_groups(self.groups, self.classifier.bias.shape[0])
        for group, members in zip(self.groups, self._members):
            if not len(members):
                raise UserError(
                    f"Expected images of {group.name!r} in {self.source().spec!r}, found none."
                )
        devices.check_divisible(self.attack.batch_size, mesh)
        check_batch_size(self.attack.batch_size, len(self.source()), self.model.input_size)

    @property
    def groups(self) -> tuple[Group, Group]:
        """The two groups: their labels among the images', their classes among the probe's."""
        theirs, ours = self.source().class_names, self.classifier.class_names
        groups = ((self.first, self.first_range), (self.second, self.second_range))
        first, second = (make_group(n, theirs, ours, r, self.class_map) for n, r in groups)
        return first, second

    def compute(self, session: Session) -> None:
        place = lambda tree: devices.replicate(session.mesh, tree)
        job = dataclasses.replace(self, encoder=place(self.model), probe=place(self.classifier))
        for number in (0, 1):
            job._classify(session, number)
        correct = [_correct(session, group, n)[0] for n, group in enumerate(self.groups)]
        for number in (0, 1):
            job._attack(session, number, correct[number], correct[1 - number])

    def merge(self, session: Session) -> Summary:
        clean, outcomes, tables, asked = {}, {}, [], {}
        for place, (own, other) in enumerate((self.groups, self.groups[::-1])):
            clean[own.name] = _correct(session, own, place)[1]
            found = session.run.read_parts(f"attack_{place}")
            direction = f"{own.name} -> {other.name}"
            outcomes[direction] = np.isin(found["predicted"], other.classes)
            number = len(self._members[place])
            asked[direction] = min(self.attack.num_images or number, number)
            tables.append(self._table(direction, found, outcomes[direction]))
        joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        runs.write_table(session.run.path / "impersonations.parquet", joined)
        outcomes["both"] = np.concatenate(list(outcomes.values()))
        asked["both"] = sum(asked.values())
        why = "could not be read, or are not classified right before the attack"
        rows = [
            row
            for direction, success in outcomes.items()
            for row in runs.of_asked(self._rows(direction, success), asked[direction], why)
        ]
        left_out = parts.unreadable(session.run, but=("gallery_0", "gallery_1"))
        accuracies = {name: estimate._asdict() for name, estimate in clean.items()}
        bad = int(sum((table["predicted"] < 0).sum() for table in tables))
        return self.summary(rows, left_out, clean_accuracy=accuracies, not_finite=bad)

    def draw(self, session: Session) -> None:
        from ur_jax.report import plots  # needs matplotlib, of the extra "report"

        shown, out = self.gallery(session), session.run.path / "impersonations.png"
        images, targets, attacked = (shown[name] for name in ("images", "targets", "attacked"))
        plots.plot_impersonation(
            out, images, targets, attacked, shown["success"], self.attack.read_at
        )

    @classmethod
    def values(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Values]:
        table = runs.read_table(folder / "impersonations.parquet")
        eps = summary.identity["attack"]["eps"]
        for step in np.unique(table["step"]):
            at = table["step"] == step
            hit = table["success"][at].astype(np.float64)
            for direction in (*np.unique(table["direction"]), "both"):
                own = (table["direction"][at] == direction) | (direction == "both")
                yield Values(
                    "impersonation_success", table["index"][at][own], hit[own],
                    eps=eps, step=int(step), images=str(direction),
                )  # fmt: skip

    @classmethod
    def remarks(cls, summary: Summary) -> Iterator[str]:
        yield from super().remarks(summary)
        for name, accuracy in summary.details["clean_accuracy"].items():
            yield (
                f"{name}: the probe classifies {accuracy['value']:.1%} of {accuracy['n']} clean "
                f"images correctly ({accuracy['low']:.1%} to {accuracy['high']:.1%}); only those "
                "are attacked."
            )
        if bad := summary.details.get("not_finite", 0):
            yield (
                f"At {bad} readings of the attack the representation was NaN or infinite, which "
                "counts as no success: check the encoder's weights and dtype."
            )

    def gallery(self, session: Session) -> dict[str, np.ndarray]:
        """The first images of each direction: "images", "targets" (S,H,W,3), "attacked" at each
        reading (S,R,H,W,3), and the probe's "success" (S,R), of a run that is computed."""
        shown = [session.run.read_parts(f"gallery_{place}") for place in (0, 1)]
        for place, other in enumerate(self.groups[::-1]):
            shown[place]["success"] = np.isin(shown[place].pop("predicted"), other.classes)
        return {name: np.concatenate([part[name] for part in shown]) for name in shown[0]}

    @functools.cached_property
    def _members(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of all images of each group."""
        source = self.source()
        found = np.array([source.label(index) for index in range(len(source))])
        first, second = (np.flatnonzero(np.isin(found, group.labels)) for group in self.groups)
        return first, second

    def _classify(self, session: Session, place: int) -> None:
        """Predicted classes of all images of a group."""

        def compute(batch: ImageBatch) -> dict[str, Any]:
            return {"predicted": self._predict(devices.shard(session.mesh, batch.images))}

        title = f"{self.groups[place].name}: clean images"
        self._stage(session, f"clean_{place}", title, compute, self._members[place])

    def _attack(self, session: Session, place: int, own: np.ndarray, others: np.ndarray) -> None:
        """Attacks some images of a group towards the other's: values (N,R) at each reading."""
        config, encoder, mesh = self.attack, self.model, session.mesh
        own = own[evenly_spaced(len(own), min(len(own), config.num_images or len(own)))]
        order = np.random.default_rng([config.seed, place]).permutation(len(others))
        targets = others[order[np.arange(len(own)) % len(others)]]
        base = jax.random.fold_in(jax.random.key(config.seed), place)

        def compute(batch: ImageBatch, target: ImageBatch) -> dict[str, Any]:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(base, batch.indices.astype(np.uint32))
            images, aims, keys = devices.shard(mesh, (batch.images, target.images, keys))
            towards = parts.encode(encoder, aims)
            reads, pictures = [], []
            for attacked in attack(encoder, images, keys, towards, config=config):
                far, size = _describe(encoder, images, attacked, towards)
                reads.append((self._predict(attacked), far, size))
                pictures.append(attacked[:_NUM_SHOWN])
            predicted, far, size = (np.stack(jax.device_get(x), axis=1) for x in zip(*reads))
            if batch.indices[0] == own[0]:
                shown = np.flatnonzero((batch.mask & target.mask)[:_NUM_SHOWN])
                pictures = np.stack(jax.device_get(pictures), axis=1)
                gallery = {
                    "images": batch.images[shown],
                    "targets": target.images[shown],
                    "attacked": pictures[shown],
                    "predicted": predicted[shown],
                }
                session.run.write_part(f"gallery_{place}", 0, gallery)
            return {
                "name": np.array(batch.names),
                "target": target.indices,
                "predicted": predicted,
                "distance": far,
                "perturb_linf": size,
            }

        title = f"{self.groups[place].name} -> {self.groups[1 - place].name}"
        self._stage(session, f"attack_{place}", title, compute, own, targets)

    def _rows(self, direction: str, success: np.ndarray) -> Iterator[Row]:
        """Success (N,R) of a direction, by reading."""
        for column, step in enumerate(self.attack.read_at):
            yield Row.of(
                "impersonation_success",
                proportion_interval(int(success[:, column].sum()), len(success)),
                eps=self.attack.eps,
                step=step,
                images=direction,
            )

    def _table(
        self, direction: str, found: Mapping[str, np.ndarray], success: np.ndarray
    ) -> dict[str, np.ndarray]:
        """One row per image and reading."""
        num_images, num_reads = success.shape
        repeated = {name: np.repeat(found[name], num_reads) for name in ("index", "name", "target")}
        read = {name: found[name].ravel() for name in ("predicted", "distance", "perturb_linf")}
        return {
            "direction": np.full(num_images * num_reads, direction),
            **repeated,
            "step": np.tile(self.attack.read_at, num_images),
            **read,
            "success": success.ravel(),
        }

    def _predict(self, images: Array) -> Array:
        """The probe's classes (B,)."""
        return linear.classify(self.classifier, images, jnp.zeros(len(images), jnp.int32))[0]

    def _stage(
        self, session: Session, name: str, title: str, compute: Any, *indices: np.ndarray
    ) -> None:
        """Computes the missing parts of a stage, on all hosts."""
        with hosts.before_merge(session.num_hosts):
            parts.run_stage(
                session,
                parts.Stage(name, title, indices, self.attack.batch_size),
                self.source(),
                compute,
                input_size=self.model.input_size,
                preparation=self.model.preparation,
            )


Impersonate.presets = {
    "classes": Impersonate(),
    "imagenet": Impersonate(first_range=(281, 293), second_range=(151, 274)),
}


def make_group(
    names: Sequence[str],
    image_classes: Sequence[str],
    probe_classes: Sequence[str],
    index_range: tuple[int, int] | None = None,
    class_map: labels.ClassMap = (),
) -> Group:
    """Finds the classes of a group, whatever the case of their names.

    Args:
      names: of the images' classes (sub-folders), and of the probe's unless `index_range` is given.
      image_classes: all names of the images' classes.
      probe_classes: all names of the probe's classes; may be empty with `index_range`.
      index_range: first and last of the probe's classes that count, e.g. (151, 274) for ImageNet's
        dogs.
      class_map: names that differ, the images' to the probe's.

    Raises:
      UserError: for an unknown name, or a range that is empty or outside the probe's classes.
    """
    if not names:
        raise UserError("Expected at least one class name in each group, got none.")
    found = tuple(labels.find_class("class of the images", n, image_classes) for n in names)
    title = " or ".join(names)
    if index_range is None:
        own = [image_classes[label] for label in found]
        renamed = {k: v for k, v in labels.parse_map(class_map).items() if k in own}
        classes = labels.match_classes(own, probe_classes, renamed, kind="class of the probe")
        return Group(title, found, tuple(map(int, classes)))
    first, last = index_range
    if not 0 <= first <= last or (probe_classes and last >= len(probe_classes)):
        raise UserError(
            f"Expected first and last of the probe's classes 0 to {len(probe_classes) - 1} for "
            f"{title}, got {first} and {last}."
        )
    return Group(title, found, tuple(range(first, last + 1)))


def check_groups(groups: tuple[Group, Group], num_classes: int) -> None:
    """Raises UserError if two groups share a class, or have one that the probe lacks."""
    first, second = groups
    if set(first.classes) & set(second.classes) or set(first.labels) & set(second.labels):
        raise UserError(f"Expected two groups without a common class, got {first} and {second}.")
    largest = max((*first.classes, *second.classes))
    if largest >= num_classes:
        raise UserError(f"Expected classes of the probe, 0 to {num_classes - 1}, got {largest}.")


def _correct(session: Session, group: Group, place: int) -> tuple[np.ndarray, Estimate]:
    """The images of a group that the probe classifies correctly, and their share."""
    rows = session.run.read_parts(f"clean_{place}")
    if not len(rows["index"]):
        raise UserError(f"None of the images of {group.name!r} could be read.")
    hits = np.isin(rows["predicted"], group.classes)
    if not hits.any():
        raise UserError(
            f"The probe classifies none of {len(hits)} images of {group.name!r} into that group, "
            "and only correctly classified images are attacked. Check the group's classes, or "
            "train a better probe."
        )
    return rows["index"][hits], proportion_interval(int(hits.sum()), len(hits))


@jax.jit
def _describe(
    encoder: Encoder, images: Array, attacked: Array, target: Array
) -> tuple[Array, Array]:
    """l2 distances to the targets and linf norms of the perturbations, (B,) each."""
    far = distance(encoder(attacked), target, divergence="l2")
    return far, jnp.abs(attacked - images).max((1, 2, 3))
