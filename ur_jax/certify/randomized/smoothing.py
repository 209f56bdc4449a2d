"""Randomized smoothing (Cohen et al. 2019): a certified l2 radius for any classifier."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import stats

from ur_jax.certify.inputs import check_arguments, check_classifier, paired
from ur_jax.certify.randomized.certificate import RadiusCertificate, make_certificate, sequence
from ur_jax.certify.randomized.config import RandomizedConfig
from ur_jax.certify.sequential import Outcome, Rows, num_selection_pieces, stream
from ur_jax.devices import data_mesh
from ur_jax.probes.classifier import num_classes
from ur_jax.stats.sequences import Table, level_table, looking_times, tolerance_table
from ur_jax.types import Array, Image, Images, Key

_NEVER = np.iinfo(np.int32).max


def randomized_smoothing(
    classifier: Callable[[Array], Array],
    images: Iterable[Image] | Images,
    key: Key,
    *,
    config: RandomizedConfig,
    indices: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int], Any] = lambda num_samples: None,
) -> Iterator[tuple[int, RadiusCertificate]]:
    """Certifies the smoothed classifier g(x) = argmax_c P(classifier(x + noise) = c) on images.

    **Guarantee.** Let p be the probability that the selected class is given under noise. For each
    image, over its own noise: with probability at least 1 - alpha, g is that class everywhere
    within the l2 radius `radius`, and every radius decided "robust" is one. For the adaptive bounds
    this holds of all radii together and at whatever time the test stopped. Those bounds also
    decide "not robust"; some radius with Phi(radius / sigma) <= p is wrongly decided so, before the
    cap puts it out of reach, with probability at most alpha as well. Clipping is part of the
    classifier that is smoothed. Nothing is joint over images, and two images of one index have the
    same noise: each certificate holds as said, but they fail together.

    Args:
      classifier: maps images [B,H,W,C] to logits [B,K]; a pytree such as `Classifier`, or a plain
        jittable function, which is compared by identity.
      images: images [H,W,C] float32 in [0,1], or one array [N,H,W,C]; taken as places free up.
      key: typed key of the run; noise depends on it, the index and the sample alone.
      config: the settings.
      indices: index of each image, which keys its noise; 0, 1, ... by default.
      mesh: devices to use; all local ones by default.
      batch_size: samples per device and forward pass; see `memory.fit_batch_size`.
      on_progress: called every few seconds with the number of samples since the last call.

    Returns:
      (index, certificate) of each image, an iterator: as they are decided, not in the order of the
      images.

    Raises:
      UserError: for an encoder instead of a classifier, other settings or another key, at once; for
        an image that is not [H,W,3] in [0,1], or without an index, or if the classifier's output is
        not [B,K] with K >= 2, where the image is taken.

    Reference: Cohen, Rosenfeld and Kolter (2019), Certify in Algorithm 2; Voracek (2024).
    """
    outcomes = _run(classifier, images, key, config, True, indices, mesh, batch_size, on_progress)
    return (
        (outcome.index, make_certificate(outcome, config, _uniform(key, outcome.index, config)))
        for outcome in outcomes
    )


def _uniform(key: Key, index: int, config: RandomizedConfig) -> float:
    """What an image's bound is randomised by, of its own key; 0.05 at least: it stays finite."""
    if not config.randomize:
        return 1.0
    own = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(b"uniform")), index)
    return max(float(jax.random.uniform(own)), 0.05)


class Prediction(NamedTuple):
    """Prediction of the smoothed classifier for one image.

    Attributes:
      predicted: the class seen most often.
      abstained: whether the runner-up is too close, or an output was not finite.
      counts: how often each class was seen, [K].
      p_value: of the two-sided binomial test that the first two classes are equally likely.
    """

    predicted: int
    abstained: bool
    counts: np.ndarray
    p_value: float


def smoothed_predictions(
    classifier: Callable[[Array], Array],
    images: Iterable[Image] | Images,
    key: Key,
    *,
    config: RandomizedConfig,
    indices: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[int, Prediction]]:
    """Predicts by the smoothed classifier from n0 samples each, or abstains.

    **Guarantee.** For each image, with probability at least 1 - alpha over its noise, the
    prediction abstains or is the class of the smoothed classifier.

    Args:
      classifier: as of `randomized_smoothing`, and so are the others.
      images: see there.
      key: see there.
      config: sigma, alpha, clip, step and n0, the number of samples.
      indices: see there.
      mesh: see there.
      batch_size: see there.

    Returns:
      (index, prediction) of each image, an iterator, as they are done.

    Raises:
      UserError: as `randomized_smoothing`.

    Reference: Cohen et al. (2019), Predict in Algorithm 1; Hung and Fithian (2019).
    """
    outcomes = _run(classifier, images, key, config, False, indices, mesh, batch_size, _ignore)
    return ((outcome.index, _prediction(outcome, config.alpha)) for outcome in outcomes)


def _prediction(outcome: Outcome, alpha: float) -> Prediction:
    """The prediction from an image's counts."""
    second, first = np.sort(outcome.counts)[-2:]
    p_value = stats.binomtest(int(first), int(first + second)).pvalue if first else 1.0
    abstained = bool(p_value > alpha or outcome.num_bad)
    return Prediction(int(outcome.counts.argmax()), abstained, outcome.counts, float(p_value))


@dataclass(frozen=True)
class _Classes:
    """Counts classes; selects the most frequent one, then tests its probability."""

    sigma: float
    clip: bool
    n0: int
    n: int
    step: int
    num_events: int
    first: int = 0
    noise: str = "float"

    def observe(self, model, extra, images):
        """One event per class: it has the largest logit."""
        logits = model(images)
        finite = jnp.isfinite(logits).all(axis=1)
        return jax.nn.one_hot(logits.argmax(axis=1), self.num_events, dtype=jnp.int32), finite

    def decide(self, tables: Table, rows: Rows) -> Rows:
        """Selects after n0 samples; then looks the class's count up."""
        selection = num_selection_pieces(self.n0, self.step)
        if self.n == 0:
            return rows
        selects = rows.pieces == selection
        top, verdicts = rows.answer
        top = jnp.where(selects, rows.counts.argmax(axis=1).astype(jnp.int32), top)
        counts = jnp.where(selects[:, None], 0, rows.counts)
        count = jnp.take_along_axis(counts, top[:, None], axis=1)
        time = jnp.maximum(rows.pieces - selection - 1, 0)
        yes, no = count >= tables.accept[time], count <= tables.reject[time]
        news = jnp.where(yes, 1, jnp.where(no, -1, 0)).astype(jnp.int8)
        open_ = (verdicts == 0) & (rows.pieces > selection)[:, None]
        verdicts = jnp.where(open_, news, verdicts)
        return rows._replace(
            counts=counts, answer=(top, verdicts), done=rows.done | (verdicts != 0).all(axis=1)
        )


def _ignore(num_samples):
    """Ignores progress."""


def _tables(config: RandomizedConfig) -> Table:
    """The stopping thresholds; one question per radius, or one in all."""
    times = looking_times(config.n, config.step)
    if config.bound == "exact":
        never = np.full((len(times), 1), _NEVER, np.int32)
        return Table(never, -np.ones_like(never))
    if config.radii:
        return level_table(sequence(config), times, config.levels)
    tolerance = config.tolerance or 0.1 * config.sigma
    return tolerance_table(sequence(config), times, sigma=config.sigma, tolerance=tolerance)


def _run(classifier, images, key, config, tests, indices, mesh, batch_size, on_progress):
    """Streams the outcomes of counting classes; without `tests`, of the selection alone."""
    check_classifier(classifier)
    check_arguments(key, config, RandomizedConfig, mesh, batch_size)
    pairs = paired(images, indices, classifier, config.noise)
    n, mesh = config.n if tests else 0, mesh or data_mesh()
    return _outcomes(classifier, pairs, key, config, n, mesh, batch_size, on_progress)


def _outcomes(classifier, pairs, key, config, n, mesh, batch_size, on_progress):
    """The outcomes, from the first image on."""
    head = next(pairs, None)
    if head is None:
        return
    if jax.tree_util.all_leaves([classifier]):  # a plain function
        classifier = jax.tree_util.Partial(classifier)
    method = _Classes(
        sigma=config.sigma,
        clip=config.clip,
        noise=config.noise,
        n0=config.n0,
        n=n,
        step=config.step,
        num_events=num_classes(classifier, head[1].shape),
    )
    tables = _tables(config)
    yield from stream(
        classifier,
        ((index, image, ()) for index, image in itertools.chain([head], pairs)),
        key,
        method=method,
        tables=tables,
        answer=(np.int32(0), np.zeros(tables.accept.shape[1], np.int8)),
        mesh=mesh,
        batch_size=batch_size,
        on_progress=on_progress,
    )
