"""k-nearest-neighbour accuracy of an encoder, beside that of the raw pixels.

    python experiments/knn.py --encoder demo \\
        --images folder:cifar10/train --test-images folder:cifar10/test

Cosine similarity, a vote of k neighbours weighted by exp(similarity / 0.07) (Wu et al. 2018). Needs
labels: sub-folders, or a labelled tfds data set. With --out, what is encoded is kept there: a
killed run resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from ur_jax import devices, metrics, runs
from ur_jax.checks import check_whole
from ur_jax.data import check_batch_size, evenly_spaced, labels
from ur_jax.errors import UserError
from ur_jax.jobs import parts
from ur_jax.jobs.base import ImagesLike, Job, Representation, Session, register
from ur_jax.metrics.checks import check_spread
from ur_jax.runs.summary import Row, Summary

PIXELS, FEATURES = "raw pixels", "representations"
"""What neighbours are nearest in: a row's "images"."""


@register("knn")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn(Job):
    """k-nearest-neighbour accuracy: --images vote for the classes of --test-images."""

    image_fields = ("images", "test_images")
    out_is_optional = True

    test_images: ImagesLike = tyro.MISSING
    """Image spec of the images that are classified; those of --images vote."""
    num_images: int | None = None
    """Evenly spaced subset of --images; all by default."""
    num_test_images: int | None = None
    """Evenly spaced subset of --test-images; all by default."""
    k: int = 200
    """Neighbours that vote, at most as many as there are voting images."""
    batch_size: int = 256
    """Images per batch, over all devices."""
    class_map: tuple[str, ...] = ()
    """THEIRS=OURS each: classes of the test images whose names differ from the voting ones'."""
    representation: Representation = "features"
    """features (what probes read: of most networks the backbone), paper, backbone, projection or
    another output."""

    def __post_init__(self):
        super().__post_init__()
        check_whole(self, "num_images", "num_test_images", optional=True)
        check_whole(self, "k", "batch_size")
        labels.parse_map(self.class_map)

    @property
    def samples(self) -> int:
        return sum(len(self.indices(field)) for field in self.image_fields)

    def indices(self, field: str = "images") -> np.ndarray:
        """The positions of the voting images, or of the test images."""
        wanted = self.num_images if field == "images" else self.num_test_images
        total = len(self.source(field))
        return evenly_spaced(total, total if wanted is None else wanted)

    def check(self, mesh: Mesh) -> None:
        number = len(self.indices())
        if self.k > number:
            raise UserError(f"Expected k <= {number}, the voting images, got {self.k}.")
        for field, least in zip(self.image_fields, (2, 1)):
            labels.check_classes(self.source(field), least)
            labels.check_labelled(self.source(field), self.indices(field))
        self.test_classes()
        devices.check_divisible(self.batch_size, mesh)
        check_batch_size(self.batch_size, number, self.model.input_size)

    def test_classes(self) -> np.ndarray:
        """Where the classes of the test images are among those of the voting images."""
        theirs, ours = (self.source(f).class_names for f in ("test_images", "images"))
        return labels.match_classes(theirs, ours, self.class_map, kind="class of the voting images")

    def compute(self, session: Session) -> None:
        encoder = devices.replicate(session.mesh, self.model)

        for field, title in zip(self.image_fields, ("voting images", "classified images")):
            source = self.source(field)

            def compute(batch, source=source):
                asked = labels.labels_of(source, batch.labels, batch.mask, batch.names)
                images = devices.shard(session.mesh, batch.images)
                pixels = np.rint(batch.images * 255).astype(np.uint8).reshape(len(asked), -1)
                return {"label": asked, "clean": parts.encode(encoder, images), "pixels": pixels}

            parts.run_stage(
                session,
                parts.Stage(field, title, (self.indices(field),), self.batch_size),
                source,
                compute,
                input_size=encoder.input_size,
                preparation=encoder.preparation,
            )

    def merge(self, session: Session) -> Summary:
        votes, asked = (session.run.read_parts(field) for field in self.image_fields)
        for found, what in ((votes, "voting"), (asked, "test")):
            if not len(found["index"]):
                raise UserError(f"None of the {what} images could be read.")
        if self.k > len(votes["index"]):
            raise UserError(
                f"Only {len(votes['index'])} voting images could be read, for k = {self.k}."
            )
        check_spread(votes["clean"], f"encoder {self.model.name!r}")
        rows = []
        for name, features in ((PIXELS, _centred_pixels), (FEATURES, _representations)):
            estimate = metrics.knn_accuracy(
                features(votes),
                votes["label"],
                features(asked),
                self.test_classes()[asked["label"]],
                k=self.k,
            )
            rows.append(Row.of("knn_accuracy", estimate, images=name))
        details = {"voting": len(votes["index"]), "shared": _num_shared(votes, asked)}
        rows = runs.of_asked(rows, len(self.indices("test_images")))
        return self.summary(list(rows), parts.unreadable(session.run), **details)

    @classmethod
    def remarks(cls, summary: Summary) -> Iterator[str]:
        yield from super().remarks(summary)
        yield f"k = {summary.identity['k']}, {summary.details['voting']} voting images."
        if shared := summary.details.get("shared", 0):
            yield (
                f"{shared} of {summary.rows[0].n} test images are among the voting images, pixel "
                "for pixel: each of them votes for itself."
            )


def _num_shared(votes: Mapping[str, np.ndarray], asked: Mapping[str, np.ndarray]) -> int:
    """How many test images are among the voting images, pixel for pixel."""
    digest = lambda row: hashlib.blake2b(row.tobytes(), digest_size=16).digest()
    known = set(map(digest, votes["pixels"]))
    return sum(digest(row) in known for row in asked["pixels"])


def _centred_pixels(found):
    """Pixels (N,H*W*C), grey at 0."""
    return jnp.asarray(found["pixels"].astype(np.float32) / np.float32(255) - np.float32(0.5))


def _representations(found):
    """Representations (N,D)."""
    return jnp.asarray(found["clean"])
