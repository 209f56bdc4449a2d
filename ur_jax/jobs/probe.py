"""Trains a linear probe on an encoder and tests it: top-1 and top-5 accuracy.

    python experiments/probe.py --encoder demo --images folder:cifar10/train \\
        --test-images folder:cifar10/test --kind noisy --cached --out runs/noisy

Kinds: standard, noisy (Gaussian noise on the images, sigma 0.25) and low_pass (frequencies inside a
disc). The probe reads the representation `features`. Without --cached it trains as the paper does,
on fresh crops and noise in every epoch; with --cached on features encoded once, in a small part of
the time (see --num-draws).

Writes to --out: `probe/` (a checkpoint that `certify.py --method randomized --representation
features --probe` and `impersonate.py` take), `predictions.parquet` (per test image, of the probe's
kind and clean) and `summary.json`. A killed run resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from ur_jax import devices, runs
from ur_jax.checks import check_whole
from ur_jax.data import ProbeViews, ViewConfig, check_batch_size, evenly_spaced, labels
from ur_jax.devices import hosts
from ur_jax.encoders import checkpoints
from ur_jax.errors import DamagedError, UserError
from ur_jax.jobs import parts, probe_training
from ur_jax.jobs.base import ImagesLike, Job, Representation, Session, register
from ur_jax.probes import linear
from ur_jax.probes.checkpoint import restore_probe, save_probe
from ur_jax.probes.classifier import Classifier
from ur_jax.probes.linear import ProbeConfig
from ur_jax.runs.summary import Row, Summary
from ur_jax.stats.intervals import proportion_interval
from ur_jax.types import Values

TOP = (1, 5)
"""The k of the top-k accuracies that are reported."""


@register("probe")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(Job):
    """A linear probe: trained on labelled images, tested on others, in the folder `probe`."""

    image_fields = ("images", "test_images")

    test_images: ImagesLike = tyro.MISSING
    """Image spec of the test images, with labels; --images are those of the training."""
    num_images: int | None = None
    """Evenly spaced subset of --images; all by default."""
    num_test_images: int | None = None
    """Evenly spaced subset of --test-images; all by default."""
    cached: bool = False
    """Encode the training images once and train on the features: far faster."""
    num_draws: int = 1
    """Of --cached: draws of crops and noise of each image that the epochs take in turn. As many as
    epochs give the paper's training again; where nothing is random one is taken."""
    seed: int = 0
    """Of weights, order, crops and noise."""
    class_map: tuple[str, ...] = ()
    """THEIRS=OURS each: classes of the test images whose names differ from the training's."""
    representation: Representation = "features"
    """features (what the paper's probes read), paper, backbone, projection or another output."""
    views: tyro.conf.OmitArgPrefixes[ViewConfig] = ViewConfig()
    training: tyro.conf.OmitArgPrefixes[ProbeConfig] = ProbeConfig()

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, "num_images", "num_test_images", optional=True)
        check_whole(self, "num_draws")
        check_whole(self, "seed", least=0)
        if self.num_draws > 1 and not self.cached:
            raise UserError(
                f"Expected num_draws={self.num_draws} with cached=True: without it, every epoch "
                "draws anew."
            )
        labels.parse_map(self.class_map)

    @property
    def settings(self) -> dict[str, Any]:
        left_out = () if self.cached else ("num_draws",)
        return {k: v for k, v in super().settings.items() if k not in left_out}

    @property
    def samples(self) -> int:
        passes = self.num_draws if self.cached else self.training.num_epochs
        num_train = self.num_images or len(self.source())
        return num_train * passes + 2 * (self.num_test_images or len(self.source("test_images")))

    def indices(self, field: str = "images") -> np.ndarray:
        """The positions of the training images, or of the test images."""
        wanted = self.num_images if field == "images" else self.num_test_images
        total = len(self.source(field))
        return evenly_spaced(total, total if wanted is None else wanted)

    def check(self, mesh: Mesh) -> None:
        for field, least in zip(self.image_fields, (2, 1)):
            labels.check_classes(self.source(field), least)
            labels.check_labelled(self.source(field), self.indices(field))
        self.test_classes()
        shares = self.cached or jax.process_count() == 1  # else a batch is one of all hosts
        whole = mesh if shares else devices.data_mesh(jax.devices())
        devices.check_divisible(self.training.batch_size, whole)
        check_batch_size(self.training.batch_size, len(self.indices()), self.model.input_size)

    def test_classes(self) -> np.ndarray:
        """Where the classes of the test images are among those of the training images."""
        theirs, ours = (self.source(f).class_names for f in ("test_images", "images"))
        kind = "class of the training images"
        return labels.match_classes(theirs, ours, self.class_map, kind=kind)

    def compute(self, session: Session) -> None:
        if checkpoints.is_saved(session.run.path / "probe"):
            trained, _ = self._restored(session)
        else:
            trained, history = probe_training.train(self, session)
            known = {
                "kind": self.views.kind,
                "class_names": self.source().class_names,
                "training": runs.read_json(session.run.path / "config.json"),
                "history": history,
                "trained_with": runs.provenance(),
            }
            save_probe(session.run.path / "probe", trained, self.model, known)
        self._test(session, trained)

    def merge(self, session: Session) -> Summary:
        rows, tables = [], []
        for kind in self._tested:
            found = session.run.read_parts(f"test_{kind}")
            if not len(found["index"]):
                raise UserError(
                    f"None of the {len(self.indices('test_images'))} test images could be read."
                )
            for k in TOP:
                estimate = proportion_interval(int((found["rank"] < k).sum()), len(found["rank"]))
                rows.append(Row.of(f"top_{k}_accuracy", estimate, images=kind))
            columns = ("index", "name", "label", "predicted", "rank")
            kinds = np.full(len(found["index"]), kind)
            tables.append({"images": kinds} | {name: found[name] for name in columns})
        joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        runs.write_table(session.run.path / "predictions.parquet", joined)
        # Weights are restored by all hosts together, and here there is but one.
        known = checkpoints.read_metadata(session.run.path / "probe")["probe"]
        rows = runs.of_asked(rows, len(self.indices("test_images")))
        left_out, shared = parts.unreadable(session.run), self._num_shared()
        return self.summary(list(rows), left_out, history=known["history"], shared=shared)

    @classmethod
    def remarks(cls, summary: Summary) -> Iterator[str]:
        yield from super().remarks(summary)
        last = summary.details["history"][-1]
        yield f"Last epoch: loss {last['loss']:.3f}, training accuracy {last['accuracy']:.2%}."
        if shared := summary.details.get("shared", 0):
            row = summary.rows[0]
            yield (
                f"{shared} of {row.n + row.n_excluded} test images are among the training images: "
                "this is no accuracy on new images."
            )

    @classmethod
    def values(
        cls, folder: Path, summary: Summary, siblings: Mapping[str, Summary]
    ) -> Iterator[Values]:
        table = runs.read_table(folder / "predictions.parquet")
        for kind in np.unique(table["images"]):
            chosen = table["images"] == kind
            for k in TOP:
                hit = (table["rank"][chosen] < k).astype(np.float64)
                yield Values(f"top_{k}_accuracy", table["index"][chosen], hit, images=str(kind))

    @property
    def _tested(self) -> tuple[str, ...]:
        """The kinds of images that are classified: the probe's own, and clean ones."""
        return tuple(dict.fromkeys((self.views.kind, "standard")))

    def _num_shared(self) -> int:
        """How many of the test images are among the training images, whatever they are called."""
        known, asked = (
            self.source(field).fingerprints(self.indices(field)) for field in self.image_fields
        )
        return sum(fingerprint in set(known) for fingerprint in asked)

    def _restored(self, session: Session) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """The probe that this run has trained; since it is this job's, it fits, or is damaged."""
        path = session.run.path / "probe"
        try:
            return restore_probe(path, self.model)
        except UserError as error:
            raise DamagedError(path, str(error), "It is trained again.") from error

    def _test(self, session: Session, trained: Mapping[str, Any]) -> None:
        """Classifies images of the probe's kind, and clean ones."""
        source, indices, classes = (
            self.source("test_images"), self.indices("test_images"), self.test_classes()
        )  # fmt: skip
        kernel, bias = (jnp.asarray(trained[name]) for name in ("kernel", "bias"))
        classifier = devices.replicate(session.mesh, Classifier(self.model, kernel, bias))

        def compute(batch):
            asked = classes[labels.labels_of(source, batch.labels, batch.mask, batch.names)]
            images, shared = devices.shard(session.mesh, (batch.images, asked))
            predicted, rank = linear.classify(classifier, images, shared)
            names = np.array(batch.names)
            return {"name": names, "label": asked, "predicted": predicted, "rank": rank}

        for kind in self._tested:
            views = dataclasses.replace(self.views, kind=kind)
            seen = ProbeViews(source, self.model, views, random=False, seed=self.seed)
            title = f"{kind} test images"
            self.run_stage(session, f"test_{kind}", title, seen, indices, compute)

    def run_stage(
        self, session: Session, name: str, title: str, views: ProbeViews, indices: np.ndarray,
        compute: Any,
    ) -> None:  # fmt: skip
        """Computes the missing parts of a stage over the views of some images, on all hosts."""
        with hosts.before_merge(session.num_hosts):
            parts.run_stage(
                session,
                parts.Stage(name, title, (indices,), self.training.batch_size),
                views,
                compute,
                input_size=self.model.input_size,
                preparation=views.preparation,
            )
