"""The label-free table of one encoder: attacks, distances, overlap, breakaway and neighbours.

    python experiments/evaluate.py --encoder demo --images demo --preset quick --out runs/demo

Writes to --out: `summary.json` (value, interval and n of every metric, with what made them),
`attacks.parquet`, `pairs.parquet`, `neighbours.parquet` (per image), `distances.parquet` (the
distribution of clean distances), `distances.png`, `margins.png`, `gallery.png`. A killed run
resumes where it stopped and ends with the same numbers. On several hosts start the same command on
each: batches are divided over the hosts, a batch over each host's devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from ur_jax import devices, metrics, runs
from ur_jax.attacks import RULES, AttackConfig, strong, u_pgd
from ur_jax.checks import check_distinct
from ur_jax.data import (
    ImageBatch,
    check_batch_size,
    evenly_spaced,
    image_batches,
    load_uint8,
)
from ur_jax.devices import hosts
from ur_jax.distances import distance
from ur_jax.errors import UserError, unknown_name
from ur_jax.jobs import attack_health, doubts, parts, strongest
from ur_jax.jobs import label_free_sizes as sizes
from ur_jax.jobs import label_free_tables as tables
from ur_jax.jobs import label_free_values as per_image
from ur_jax.jobs.base import Curve, Job, Session, register
from ur_jax.jobs.label_free_config import PAPER, PRESETS, STAGES, EvaluationConfig
from ur_jax.jobs.label_free_tables import DIVERGENCES
from ur_jax.jobs.minutes import check_alone, check_minutes
from ur_jax.runs.summary import Summary
from ur_jax.types import Array, Values

_NUM_SHOWN = 6
_STEP_COST = 3  # forward passes that a step costs, with its gradient
# Streams of random numbers, one per use; `tables.DISTRIBUTION` is the seventh.
_UNTARGETED, _TARGETED, _TARGETS, _OVERLAP, _PAIRS, _BREAKAWAY = range(6)


@register("evaluate")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelFree(Job):
    """The paper's label-free measures of one encoder, but for certification."""

    stages: tuple[Literal["distances", "attacks", "overlap", "breakaway", "strongest"], ...] = PAPER
    """What to evaluate: the paper's measures, and the strongest attack that is found."""
    protocol: tyro.conf.OmitArgPrefixes[EvaluationConfig] = EvaluationConfig()
    minutes: float | None = None
    """Instead of num_images: speed is measured, and as many images are taken as fit."""

    def __post_init__(self):
        super().__post_init__()
        if self.minutes is not None:
            check_minutes(self.minutes)

    @property
    def settings(self) -> dict[str, Any]:
        found = {"stages": list(self.stages), "protocol": self.protocol.of_stages(self.stages)}
        return found if self.minutes is None else {**found, "minutes": float(self.minutes)}

    @property
    def samples(self) -> int:
        """Images that will pass through the encoder, a step of an attack counted as 3."""
        protocol, total = self.protocol, len(self.source())
        attacked = min(protocol.num_images, total) * protocol.num_restarts
        cost = self.step_cost
        steps = cost * (max(protocol.read_at) + 1)
        return sum(
            {
                "distances": protocol.num_clean or total,
                "attacks": len(protocol.eps) * attacked * (2 * steps + 1),
                "overlap": 2 * min(attacked, total // 2) * (cost * protocol.overlap_steps + 1),
                "breakaway": attacked * (cost * protocol.breakaway_steps + 1),
                "strongest": sum(
                    min(protocol.num_images, total) * protocol.strong(eps).forward_passes
                    for eps in protocol.strong_eps
                ),
            }[stage]
            for stage in self.stages
        )

    @property
    def step_cost(self) -> int:
        """Samples that a step of an attack counts as."""
        has_gradient = getattr(RULES[self.protocol.rule](), "needs_gradient", True)
        return _STEP_COST if has_gradient else 1

    def settled(self, begun: Mapping[str, Any], mesh: Mesh) -> LabelFree:
        """With a batch size that fits on every host, and as many images as fit into `minutes`; or
        with those that the run began with."""
        if self.minutes is not None:
            return dataclasses.replace(self, protocol=self._fitting(begun, mesh))
        if self.protocol.batch_size is not None:
            return self
        size = begun.get("protocol", {}).get("batch_size")
        if size is None:
            fitting = sizes.fit_batch_size(self.protocol, self.model, mesh, jax.process_count())
            size = int(hosts.on_all_hosts(fitting).min())
        return dataclasses.replace(
            self, protocol=dataclasses.replace(self.protocol, batch_size=size)
        )

    def _fitting(self, begun: Mapping[str, Any], mesh: Mesh) -> EvaluationConfig:
        """The protocol with as many images as fit into the minutes."""
        assert self.minutes is not None
        check_alone(self.minutes, self.protocol.num_images, _UNASKED)
        if begun.get("minutes") == self.minutes:
            return sizes.begun_with(self.protocol, begun)
        return sizes.fitting(self, mesh)

    def check(self, mesh: Mesh) -> None:
        for stage in self.stages:
            if stage not in STAGES:
                raise unknown_name("stage", stage, STAGES)
        check_distinct(self, "stages")
        if not self.stages:
            raise UserError(f"Expected at least one stage of {', '.join(STAGES)}.")
        if "strongest" in self.stages and not self.protocol.strong_eps:
            raise UserError("Expected at least one strong_eps with the stage strongest, got none.")
        if self.protocol.needs_bank and {"attacks", "overlap"} & set(self.stages):
            raise UserError(
                f"Expected stages distances and breakaway alone with the objective "
                f"{self.protocol.objective!r}, which has no target, got "
                f"{', '.join(self.stages)}; add --stages breakaway."
            )
        sizes.check_fits(self.protocol, len(self.source()), mesh)
        if self.protocol.batch_size is not None:
            size, total = self.protocol.batch_size, len(self.source())
            check_batch_size(size, total, self.model.input_size)

    def compute(self, session: Session) -> None:
        job = dataclasses.replace(self, encoder=devices.replicate(session.mesh, self.model))
        if self._needs_bank:
            job._clean(session)
        compute = {
            "attacks": job._attacks,
            "overlap": job._overlap,
            "breakaway": job._breakaway,
            "strongest": job._strongest,
        }
        for stage in self.stages:
            if stage != "distances":  # they follow from the bank
                compute[stage](session)

    def merge(self, session: Session) -> Summary:
        clean = self._bank(session).run.read_parts("clean") if self._needs_bank else {}
        run, config = session.run, self.protocol
        distributions = {}
        if {"distances", "attacks", "strongest"} & set(self.stages):
            distributions = tables.distributions(clean, config)
        make = {
            "distances": lambda: tables.distance_rows(run, distributions, clean, config),
            "attacks": lambda: tables.attack_rows(run, distributions, config),
            "breakaway": lambda: tables.breakaway_rows(run, clean, config, session.mesh),
            "overlap": lambda: tables.overlap_rows(run, config),
            "strongest": lambda: strongest.rows(run, distributions, clean, config, session.mesh),
        }
        rows = [
            row
            for stage, table in make.items()
            if stage in self.stages
            for row in runs.of_asked(table(), self._asked(stage))
        ]
        left_out = parts.unreadable(run, *([clean] if clean else []), but=("gallery",))
        has_strongest = "strongest" in self.stages
        return self.summary(
            rows,
            left_out,
            attack_health=attack_health.measured(run, self.attack_stages),
            **({"strongest": strongest.by_member(run, config)} if has_strongest else {}),
            doubts=doubts.found(run, self.stages, clean, config),
        )

    def draw(self, session: Session) -> None:
        from ur_jax.report import plots  # needs matplotlib, of the extra "report"

        out = session.run.path
        if "attacks" in self.stages:
            plots.plot_distances(out / "distances.png", runs.read_table(out / "attacks.parquet"))
        if "overlap" in self.stages:
            plots.plot_margins(out / "margins.png", runs.read_table(out / "pairs.parquet"))
        if "breakaway" not in self.stages or not session.run.num_parts("gallery"):
            return
        clean = self._bank(session).run.read_parts("clean")
        gallery = tables.gallery(session.run, clean, session.mesh)
        rows = np.stack([gallery["before"], gallery["after"]], 1)
        decoded = load_uint8(
            self.source(), rows.ravel(),
            input_size=self.model.input_size, preparation=self.model.preparation,
        ).images  # fmt: skip
        plots.plot_gallery(
            out / "gallery.png",
            gallery["images"],
            gallery["attacked_images"],
            decoded.reshape(*rows.shape, *decoded.shape[1:]) / 255.0,
            rows,
            gallery["index"],
        )

    @property
    def attack_stages(self) -> tuple[str, ...]:
        """Names of the stages of parts that attack."""
        modes = ("untargeted", "targeted")
        histories = tuple(f"{mode}_{eps:g}" for eps in self.protocol.eps for mode in modes)
        found = {"attacks": histories, "overlap": ("overlap",), "breakaway": ("breakaway",)}
        found["strongest"] = tuple(map(strongest.part_name, self.protocol.strong_eps))
        return tuple(name for stage in self.stages for name in found.get(stage, ()))

    @classmethod
    def remarks(cls, summary: Summary) -> Iterator[str]:
        yield from super().remarks(summary)
        yield from attack_health.remarks(summary.details.get("attack_health", {}))
        yield from doubts.remarks(summary.details.get("doubts", ()))

    @classmethod
    def curves(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Curve]:
        stages = summary.identity.get("stages", ())
        scale = tables.median_clean_distance((summary, *siblings.values()))
        if "attacks" in stages:
            yield from tables.attack_curves(folder, scale)
        if "strongest" in stages:
            steps = summary.identity["protocol"]["strong_steps"]
            yield from tables.strongest_curves(folder, scale, steps)
        if "overlap" in stages and scale is not None:
            yield tables.margin_curve(folder, scale)

    @classmethod
    def values(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Values]:
        stages, protocol = summary.identity["stages"], summary.identity["protocol"]
        scale = tables.median_clean_distance((summary, *siblings.values()))
        if "attacks" in stages:
            yield from per_image.attack_values(folder, protocol, scale)
        if "breakaway" in stages:
            yield from per_image.breakaway_values(folder, protocol)
        if "overlap" in stages:
            yield from per_image.overlap_values(folder, protocol)
        if "strongest" in stages:
            yield from per_image.strongest_values(folder, protocol, scale)

    def _asked(self, stage: str) -> int:
        """Images, or pairs, whose numbers a stage is to report."""
        config, total = self.protocol, len(self.source())
        if stage == "distances":
            return min(config.num_distribution or total, config.num_clean or total)
        return min(config.num_images, total // 2 if stage == "overlap" else total)

    @property
    def _needs_bank(self) -> bool:
        """Whether clean representations of the bank are needed."""
        return bool(set(self.stages) - {"overlap"})

    @property
    def _batch_size(self) -> int:
        """Images per batch, of a job that is `settled`."""
        assert self.protocol.batch_size is not None
        return self.protocol.batch_size

    def _bank(self, session: Session) -> Session:
        """The session in the folder of the bank."""
        config, source = self.protocol, self.source()
        num_images = config.num_clean or len(source)
        return parts.with_bank(session, self.model, source, num_images, self._batch_size)

    def _clean(self, session: Session) -> None:
        """Clean representations of the bank: {"index" (N,), "clean" (N,D)}."""
        indices = evenly_spaced(len(self.source()), self.protocol.num_clean or len(self.source()))
        stage = parts.Stage("clean", "clean representations", (indices,), self._batch_size)
        parts.clean_representations(self._bank(session), self.model, self.source(), stage)

    def _attacks(self, session: Session) -> None:
        """Untargeted and targeted attacks of the same images at each eps."""
        indices = evenly_spaced(len(self.source()), self.protocol.num_images)
        targets = _derangement(indices, self._key(_TARGETS))
        num_steps = max(self.protocol.read_at) + 1  # entry t is read before step t
        for eps in self.protocol.eps:
            attack = self.protocol.attack(eps, num_steps)
            for mode, stream in (("untargeted", _UNTARGETED), ("targeted", _TARGETED)):
                compute = functools.partial(self._history, session.mesh, stream, attack)
                others = (targets,) if mode == "targeted" else ()
                name, title = f"{mode}_{eps:g}", f"{mode} attack, eps {eps:g}"
                self._stage(session, name, title, compute, indices, *others)

    def _history(
        self,
        mesh: Mesh,
        stream: int,
        attack: AttackConfig,
        batch: ImageBatch,
        target: ImageBatch | None = None,
    ) -> dict[str, Any]:
        """What is read of an attack, at each step."""
        towards = None if target is None else self._target(mesh, target)
        result = self._u_pgd(mesh, batch, stream, attack, towards)
        history = {name: getattr(result.history, name) for name in tables.HISTORY}
        if RULES[attack.rule]().keeps_best:
            history |= dict(zip(tables.BEST, result.history.best))
        history |= attack_health.columns(result, attack)
        return history | ({} if target is None else {"target": target.indices})

    def _overlap(self, session: Session) -> None:
        """Disjoint pairs, each image attacked towards the other."""
        config, mesh = self.protocol, session.mesh
        num_pairs = self._asked("overlap")
        indices = evenly_spaced(len(self.source()), 2 * num_pairs)
        indices = np.asarray(jax.random.permutation(self._key(_PAIRS), indices.astype(np.int32)))
        attack = config.attack(config.overlap_eps, config.overlap_steps)

        def compute(first, second):
            x, y = self._target(mesh, first), self._target(mesh, second)
            there = self._u_pgd(mesh, first, _OVERLAP, attack, y)
            back = self._u_pgd(mesh, second, _OVERLAP, attack, x)
            x_to_y, y_to_x = there.representations, back.representations
            health = attack_health.columns(there, attack)
            margins = {
                f"margin_{d}": metrics.adversarial_margin(x, y, x_to_y, y_to_x, divergence=d)
                for d in DIVERGENCES
            }
            clean = {f"clean_dist_{d}": distance(x, y, divergence=d) for d in DIVERGENCES}
            return {"second": second.indices, **margins, **clean, **health}

        first, second = indices[:num_pairs], indices[num_pairs:]
        self._stage(session, "overlap", "pairs attacked both ways", compute, first, second)

    def _breakaway(self, session: Session) -> None:
        """The attack whose images are looked up among the clean ones."""
        config, mesh = self.protocol, session.mesh
        attack = config.attack(config.breakaway_eps, config.breakaway_steps)
        indices = evenly_spaced(len(self.source()), config.num_images)
        bank = None
        if config.needs_bank:
            hosts.on_all_hosts(True)  # all of it is there
            bank = devices.replicate(mesh, self._bank(session).run.read_parts("clean")["clean"])

        def compute(batch):
            result = self._u_pgd(mesh, batch, _BREAKAWAY, attack, None, bank)
            clean = self._encode(mesh, batch)
            if batch.indices[0] == indices[0]:
                readable = np.flatnonzero(batch.mask)  # and no padding
                count = min(_NUM_SHOWN, len(readable))
                rows = readable[evenly_spaced(len(readable), count)] if count else readable
                shown = {"images": batch.images, "attacked_images": np.asarray(result.images)}
                shown["index"] = batch.indices
                session.run.write_part("gallery", 0, {k: v[rows] for k, v in shown.items()})
            health = attack_health.columns(result, attack)
            return {"attacked": result.representations, "clean": clean, **health}

        self._stage(session, "breakaway", "breakaway attack", compute, indices)

    def _strongest(self, session: Session) -> None:
        """The worst of several attacks on each image, at each eps."""
        config, mesh = self.protocol, session.mesh
        indices = evenly_spaced(len(self.source()), config.num_images)
        starts = range(config.strong_restarts)
        key = self._key(strongest.TARGETS)
        targets = [_derangement(indices, jax.random.fold_in(key, start)) for start in starts]
        bank = functools.cache(lambda: self._neighbours(mesh))  # if anything is missing
        for eps in config.strong_eps:

            def compute(batch, *others, eps=eps):
                towards = jnp.stack([self._target(mesh, other) for other in others])
                images, keys = self._with_keys(mesh, batch, strongest.STREAM)
                found = strong(
                    self.model,
                    images,
                    keys,
                    config=config.strong(eps),
                    targets=towards,
                    bank=bank(),
                )
                again = self._encode(mesh, batch)
                return strongest.columns(found, again, config.strong(eps))

            name, title = strongest.part_name(eps), f"the strongest attack found, eps {eps:g}"
            self._stage(session, name, title, compute, indices, *targets)

    def _neighbours(self, mesh: Mesh) -> Array:
        """Clean representations (N,D) that attacks on neighbours look at, the same on all hosts."""
        total = self.protocol.num_clean or len(self.source())
        batches = image_batches(
            self.source(), evenly_spaced(len(self.source()), min(total, strongest.NEIGHBOURS)),
            input_size=self.model.input_size, preparation=self.model.preparation,
            batch_size=self._batch_size,
        )  # fmt: skip
        found = [np.asarray(self._encode(mesh, batch))[batch.mask] for batch in batches]
        return devices.replicate(mesh, jnp.concatenate(found))

    def _stage(
        self, session: Session, name: str, title: str, compute: Any, *indices: np.ndarray
    ) -> None:
        """Computes this host's missing parts of a stage."""
        parts.run_stage(
            session,
            parts.Stage(name, title, indices, self._batch_size),
            self.source(),
            compute,
            input_size=self.model.input_size,
            preparation=self.model.preparation,
        )

    def _key(self, stream: int) -> Array:
        """The key of one use of randomness."""
        return jax.random.fold_in(jax.random.key(self.protocol.seed), stream)

    def _encode(self, mesh: Mesh, batch: ImageBatch) -> Array:
        """Clean representations (B,D) of a batch."""
        return parts.encode(self.model, devices.shard(mesh, batch.images))

    def _target(self, mesh: Mesh, batch: ImageBatch) -> Array:
        """Clean representations (B,D) to move towards; 0 for what stands for no image."""
        return jnp.where(batch.mask[:, None], self._encode(mesh, batch), 0.0)

    def _u_pgd(
        self, mesh: Mesh, batch: ImageBatch, stream: int, attack: AttackConfig,
        target: Array | None, bank: Array | None = None,
    ):  # fmt: skip
        """`u_pgd` of a batch over the devices, each image's start drawn by its own index."""
        images, keys = self._with_keys(mesh, batch, stream)
        return u_pgd(self.model, images, keys, config=attack, target=target, bank=bank)

    def _with_keys(self, mesh: Mesh, batch: ImageBatch, stream: int) -> tuple[Array, Array]:
        """The images of a batch, each with a key of its own index, over the devices."""
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys = fold(self._key(stream), batch.indices.astype(np.uint32))
        return devices.shard(mesh, (batch.images, keys))


LabelFree.presets = {name: LabelFree(**settings) for name, settings in PRESETS.items()}
_UNASKED = {preset.protocol.num_images for preset in LabelFree.presets.values()}


def _derangement(indices: np.ndarray, key: Array) -> np.ndarray:
    """Gives every image another one as target: the next on a random cycle through all of them.

    Values of two that follow one another share an image, see the sharp edges in `ur_jax/README.md`.
    """
    order = np.asarray(jax.random.permutation(key, len(indices)))
    targets = np.empty_like(indices)
    targets[order] = indices[np.roll(order, -1)]
    return targets
