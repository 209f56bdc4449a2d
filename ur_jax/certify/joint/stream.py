"""One pass over the noise that serves any number of certificates of an encoder.

The first stage represents n0 noisy samples; each certificate makes of them what it measures from
(a centre, a direction). The second stage represents n fresh ones, piece by piece, and each
certificate adds up what it needs. A piece is gathered on one device and summed there in one order,
so that neither the number of devices nor the batch size changes a bit of a sum.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax.certify.inputs import check_one_key, paired
from ur_jax.certify.joint.config import StreamConfig
from ur_jax.certify.sampling import sample_outputs
from ur_jax.checks import check_type, check_whole
from ur_jax.devices import data_mesh, replicate
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.types import Array, Key, PyTree


class Measured(NamedTuple):
    """What was measured of the second stage's samples so far; arrays on the host.

    Attributes:
      clean: [D], the representation of the clean image.
      anchor: what the first stage fixed.
      rows: of each sample, leading axis n.
      sums: over the samples, float64.
      n: how many there are.
      num_drawn: of both stages.
      num_bad: of these, samples whose representation is not finite.
      num_values: of the image, height * width * channels.
    """

    clean: np.ndarray
    anchor: PyTree
    rows: PyTree
    sums: PyTree
    n: int
    num_drawn: int
    num_bad: int
    num_values: int


class Part(Protocol):
    """A certificate of a stream: a frozen dataclass, static under jit."""

    @property
    def config(self) -> StreamConfig: ...

    def anchor(self, representations: Array, fixed: PyTree) -> PyTree:
        """What the first stage's representations [n0, D] fix; jitted."""
        ...

    def measure(
        self, anchor: PyTree, representations: Array, exists: Array
    ) -> tuple[PyTree, PyTree]:
        """(arrays with a row per sample, sums over those that exist [P]) of a piece; jitted.

        Samples that are not finite are given as zeros that do not exist; the image then abstains.
        """
        ...

    def certificate(self, measured: Measured) -> Any:
        """The certificate of what was measured."""
        ...

    def is_settled(self, certificate: Any, measured: Measured) -> bool:
        """Whether further samples would change little; only asked of adaptive settings."""
        ...


def stream_key(key: Key, tag: str = "joint") -> Key:
    """The key of the noise of these certificates: not that of center or randomized smoothing."""
    return jax.random.fold_in(key, zlib.crc32(tag.encode()))


def certify_stream(
    encoder: Encoder,
    images: Iterable[Array],
    key: Key,
    *,
    parts: Mapping[str, tuple[Part, PyTree]],
    indices: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int], Any] = lambda num_samples: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Certifies images by several certificates on one stream of samples.

    **Guarantee.** That of each certificate, with its own alphas. All of them together hold with the
    sum of the failure probabilities, since their samples are the same: give each its share of what
    is to hold together. Certificates of different images are independent over images of different
    indices; center and randomized smoothing under the same key draw other noise than these.

    Args:
      encoder: the encoder, with images [B,H,W,3] in [0,1] to representations [B,D].
      images: images [H,W,3] float32 in [0,1], or one array [N,H,W,3].
      key: typed key of the run.
      parts: {name: (the certificate, arrays that it needs, such as directions)}; their settings
        agree in `StreamConfig.sampling`.
      indices: index of each image, which keys its noise; 0, 1, ... by default.
      mesh: devices to use; all local ones by default.
      batch_size: samples per device and forward pass.
      on_progress: called with the number of samples since the last call.

    Returns:
      (index, {name: certificate}) of each image, in the order of the images, an iterator. An
      adaptive stream goes on until every certificate is settled.

    Raises:
      UserError: for another model, key or settings, or settings that disagree, at once; for an
        image that is none where it is taken.
    """
    check_type("encoder", encoder, Encoder)
    check_one_key(key)
    if mesh is not None:
        check_type("mesh", mesh, Mesh)
    check_whole(SimpleNamespace(batch_size=batch_size), "batch_size")
    if not parts:
        raise UserError("Expected at least one certificate, got none.")
    config = next(iter(parts.values()))[0].config
    for name, (part, _) in parts.items():
        if (part.config.sampling, part.config.looks) != (config.sampling, config.looks):
            raise UserError(
                f"Expected sigma, n0, n, noise, clip, step and adaptive of {name!r} as of the "
                "others: they are of one stream."
            )
    pairs = paired(images, indices, encoder, config.noise)
    return _certified(encoder, pairs, key, parts, config, mesh, batch_size, on_progress)


def _certified(
    encoder: Encoder,
    pairs: Iterator[tuple[int, Array | np.ndarray]],
    key: Key,
    parts: Mapping[str, tuple[Part, PyTree]],
    config: StreamConfig,
    mesh: Mesh | None,
    batch_size: int,
    on_progress: Callable[[int], Any],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The certificates, from the first image on."""
    mesh = mesh or data_mesh()
    alone = mesh.devices.flat[0]
    whole, key = replicate(mesh, (encoder, stream_key(key)))
    methods = tuple(part for part, _ in parts.values())
    encoder, fixed = jax.device_put((encoder, tuple(fixed for _, fixed in parts.values())), alone)
    draw = functools.partial(
        represent, whole, key, config=config, mesh=mesh, batch_size=batch_size,
        most=max(config.n0, config.n),
    )  # fmt: skip
    for index, image in pairs:
        image = replicate(mesh, jnp.asarray(image, jnp.float32))
        first = [
            jax.device_put(draw(image, index, start), alone)
            for start in range(0, config.n0, config.step)
        ]
        on_progress(config.n0)
        representations = jnp.concatenate(first)[: config.n0]
        alone_image = jax.device_put(image, alone)
        clean, anchors, num_bad = _anchors(methods, encoder, alone_image, representations, fixed)
        state = _State(jax.device_get(clean), jax.device_get(anchors), int(num_bad))
        certificates: list[Any] = []
        done = 0
        for look in config.looks:
            while done < look:
                piece = jax.device_put(draw(image, index, config.n0 + done), alone)
                number = min(config.step, config.n - done)
                state.add(_measure(methods, anchors, piece, jnp.int32(number)), number)
                done += number
                on_progress(number)
            measured = state.measured(done, config.n0 + done, math.prod(image.shape))
            certificates = [part.certificate(m) for part, m in zip(methods, measured)]
            settled = zip(methods, certificates, measured)
            if state.num_bad or all(part.is_settled(c, m) for part, c, m in settled):
                break
        yield index, dict(zip(parts, certificates))


def represent(
    encoder: Encoder, key: Key, image: Array, index: int, first: int, *, config: StreamConfig,
    mesh: Mesh, batch_size: int, most: int,
) -> Array:  # fmt: skip
    """Representations [min(step, most), D] of an image's samples from `first` on."""
    number = min(config.step, most)
    return sample_outputs(
        _represent,
        encoder,
        image,
        key,
        jnp.int32(index),
        jnp.int32(first),
        n=number,
        sigma=config.sigma,
        clip=config.clip,
        mesh=mesh,
        batch_size=min(batch_size, -(-number // mesh.size)),
        noise=config.noise,
    )


def _represent(encoder, images):
    """Representations; a function object that stays the same."""
    return encoder(images)


@functools.partial(jax.jit, static_argnames="methods")
def _anchors(
    methods: Sequence[Part], encoder: Encoder, image: Array, representations: Array, fixed: PyTree
):
    """The clean representation, what each certificate fixes, and samples that are not finite."""
    finite = jnp.isfinite(representations).all(axis=1)
    representations = jnp.where(finite[:, None], representations, 0.0)
    anchors = [m.anchor(representations, f) for m, f in zip(methods, fixed)]
    return encoder(image[None])[0], anchors, (~finite).sum()


@functools.partial(jax.jit, static_argnames="methods")
def _measure(methods: Sequence[Part], anchors: PyTree, representations: Array, number: Array):
    """Rows and sums of a piece for each certificate, and how many samples are not finite."""
    finite = jnp.isfinite(representations).all(axis=1)
    representations = jnp.where(finite[:, None], representations, 0.0)
    exists = jnp.arange(len(finite)) < number
    found = []
    for method, anchor in zip(methods, anchors):
        found.append(method.measure(anchor, representations, exists & finite))
    return found, (exists & ~finite).sum()


class _State:
    """What is measured of one image so far, in float64 on the host."""

    def __init__(self, clean: np.ndarray, anchors: Sequence[PyTree], num_bad: int):
        self.clean, self.anchors, self.num_bad = clean, anchors, num_bad
        self._rows: list[list[PyTree]] = [[] for _ in anchors]
        self._sums: list[PyTree] = [None for _ in anchors]
        self._pending: list[tuple[Any, int]] = []

    def add(self, found: Any, number: int) -> None:
        """Takes a piece into account once the next one is queued: the device never waits."""
        self._pending.append((found, number))
        if len(self._pending) > 1:
            self._absorb()

    def measured(self, n: int, num_drawn: int, num_values: int) -> list[Measured]:
        """Of each certificate."""
        while self._pending:
            self._absorb()
        rows = [jax.tree.map(lambda *xs: np.concatenate(xs), *each) for each in self._rows]
        return [
            Measured(self.clean, anchor, row, total, n, num_drawn, self.num_bad, num_values)
            for anchor, row, total in zip(self.anchors, rows, self._sums)
        ]

    def _absorb(self) -> None:
        """Adds the oldest piece."""
        (found, bad), number = jax.device_get(self._pending.pop(0))
        self.num_bad += int(bad)
        for at, (rows, sums) in enumerate(found):
            self._rows[at].append(jax.tree.map(lambda x, number=number: x[:number], rows))
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            before = self._sums[at]
            self._sums[at] = sums if before is None else jax.tree.map(np.add, before, sums)
