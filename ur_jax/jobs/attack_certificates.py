"""Certificates put to the test: is any certified image moved farther than its certificate says?

    python experiments/attack_certificates.py --encoder demo --images demo --out runs/attacked

Certifies a few images by center smoothing, attacks each within the same l2 radius by five attacks
(APGD on the encoder by l2, by angle and towards another image, APGD on the mean over the noise,
Square), and computes the smoothed representation anew at what they found. Writes `attacked.parquet`
(per image) and `summary.json`: the share of certificates that were broken, which should be none,
and how much of the certified divergence an attack reaches. A killed run resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ur_jax import devices, metrics, runs
from ur_jax.certify import CenterConfig
from ur_jax.certify.center.attacked import attack_certified
from ur_jax.checks import check_whole
from ur_jax.data import ImageBatch, check_batch_size, evenly_spaced
from ur_jax.jobs import parts
from ur_jax.jobs.base import Job, Session, register
from ur_jax.runs import write_table
from ur_jax.runs.summary import Row, Summary
from ur_jax.types import Values

_ATTACKS, _STEP_COST = 5, 3
_NO_CERTIFICATE = "without a certificate"


@register("attack-certificates")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackCertificates(Job):
    """Attacks on images that center smoothing has certified."""

    not_identity = ("samples_at_once",)

    num_images: int = 16
    """Evenly spaced ones."""
    num_steps: int = 20
    """Of each attack; Square has 10 queries for each."""
    config: CenterConfig = CenterConfig(bound="union", n0=1000, n=10_000)
    batch_size: int = 8
    """Images per batch."""
    samples_at_once: int = 64
    """Noisy samples per device and forward pass."""
    seed: int = 0
    """Of the noise and of the attacks."""

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, "num_images", "num_steps", "batch_size", "samples_at_once")
        check_whole(self, "seed", least=0)

    @property
    def samples(self) -> int:
        certificate = self.config.n0 * (2 + _ATTACKS) + self.config.n
        steps = self.num_steps * (_STEP_COST * (_ATTACKS - 2 + 8) + 10)
        return min(self.num_images, len(self.source())) * (certificate + steps)

    def check(self, mesh: Mesh) -> None:
        check_batch_size(self.batch_size, len(self.source()), self.model.input_size)
        evenly_spaced(len(self.source()), self.num_images)

    def compute(self, session: Session) -> None:
        encoder = devices.replicate(session.mesh, self.model)
        key = jax.random.key(self.seed)

        def compute(batch: ImageBatch) -> dict[str, Any]:
            rows = np.flatnonzero(batch.mask)
            size = len(batch.mask)
            found = {
                "eps_out": np.zeros(size),
                "moved": np.zeros(size),
                "attack": np.zeros(size, "U16"),
            }
            if len(rows):
                measured = attack_certified(
                    encoder, batch.images[rows], key, config=self.config,
                    num_steps=self.num_steps, indices=batch.indices[rows], mesh=session.mesh,
                    batch_size=self.samples_at_once,
                )  # fmt: skip
                for name, values in measured._asdict().items():
                    found[name][rows] = values
            return found

        indices = evenly_spaced(len(self.source()), self.num_images)
        parts.run_stage(
            session,
            parts.Stage("attacked", "certified and attacked", (indices,), self.batch_size),
            self.source(),
            compute,
            input_size=encoder.input_size,
            preparation=encoder.preparation,
        )

    def merge(self, session: Session) -> Summary:
        found = session.run.read_parts("attacked")
        names = ("eps_out", "moved", "attack")
        table = {"image": found["index"], **{name: found[name] for name in names}}
        write_table(session.run.path / "attacked.parquet", table)
        left_out = parts.unreadable(session.run)
        rows = []
        for name, values in _values(table).items():
            defined = values[~np.isnan(values)]
            if not len(defined):
                continue
            missing = {"n_excluded": len(values) - len(defined), "excluded": _NO_CERTIFICATE}
            estimate = metrics.summarise(name, defined)
            rows.append(
                Row.of(name, estimate, **self._under, **(missing if missing["n_excluded"] else {}))
            )
        return self.summary(list(runs.of_asked(rows, self.num_images)), left_out)

    @property
    def _under(self) -> dict[str, Any]:
        """The settings of the rows."""
        return {
            "divergence": self.config.divergence,
            "eps": self.config.eps_in,
            "step": self.num_steps,
        }

    @classmethod
    def remarks(cls, summary: Summary) -> Iterator[str]:
        yield from super().remarks(summary)
        for row in summary.rows:
            if row.metric == "certificates_broken" and row.value > 0:
                yield (
                    f"{row.value:.0%} of the certificates are BROKEN by an attack: more than "
                    "alpha1 + alpha2 of many should not be. Repeat with more samples and tell us."
                )

    @classmethod
    def values(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Values]:
        table = runs.read_table(folder / "attacked.parquet")
        config = summary.identity["config"]
        under = {"eps": config["eps_in"], "step": summary.identity["num_steps"]}
        for name, value in _values(table).items():
            if not np.isnan(value).all():
                yield Values(name, table["image"], value, config["divergence"], **under)


def _values(table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Per image, NaN without a certificate."""
    eps_out, moved = (np.asarray(table[name], np.float64) for name in ("eps_out", "moved"))
    certified = np.isfinite(eps_out)
    share = np.where(certified, moved / np.where(certified, eps_out, 1.0), np.nan)
    return {
        "certificates_broken": np.where(certified, moved > eps_out, np.nan),
        "moved_over_certified": share,
    }
