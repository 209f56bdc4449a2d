"""Sequential tests on many images: each draws samples until its answer is clear.

The unit of work is a *piece*: `step` consecutive samples of one image, after which the image's
counts are compared with its thresholds. A round evaluates `num_slots` pieces as one static block of
num_slots * step samples:

1. Slot s is given a piece. While at least `num_slots` images are undecided, these are the next
   pieces of as many images; an image that is decided has its slot taken by the next image of the
   queue in the very next round. When fewer are left, each has several slots, hence its next few
   pieces at once, so that no slot idles; pieces past the decision are discarded.
2. The samples of the block are divided over the devices, and each device loops over its share in
   batches of `batch_size`, adding up integer counts per slot. This inner loop has no collective and
   no host sync.
3. One `psum` of the [num_slots, E + 1] integers ends the round. Then every device looks up the same
   thresholds, piece after piece in each image's own order.

Rounds follow one another inside one `lax.while_loop`. The host looks in every few seconds, collects
decided images and hands in new ones. Decisions fall at multiples of `step` samples of each image,
whatever the slots, devices and batches: the outcome depends on the noise alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ur_jax.certify.sampling import noisy_samples
from ur_jax.devices import DATA_AXIS, replicate
from ur_jax.types import Array, Key, PyTree


class Method(Protocol):
    """What is tested: a frozen dataclass, static under jit.

    Attributes:
      sigma: standard deviation of the noise.
      clip: whether noisy images are clipped to [0,1].
      noise: "float" or "grid".
      first: index of the first sample.
      n0: number of samples before the test, e.g. to select a class; may be 0.
      n: cap on the number of samples of the test.
      step: samples per piece.
      num_events: E, the number of events counted.
    """

    @property
    def sigma(self) -> float: ...
    @property
    def clip(self) -> bool: ...
    @property
    def noise(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def n0(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def num_events(self) -> int: ...

    def observe(self, model: PyTree, extra: PyTree, images: Array) -> tuple[Array, Array]:
        """Returns events [B,E] int32 and whether the outputs are finite [B], of noisy images."""
        ...

    def decide(self, tables: PyTree, rows: Rows) -> Rows:
        """Updates `answer`, `counts` and `done` of all rows, each after its latest piece."""
        ...


class Rows(NamedTuple):
    """The images in flight; leading axis Q on every leaf, the same on all devices.

    Attributes:
      images: [Q,H,W,C] float32.
      indices: [Q] int32, index of each image.
      extra: what the method knows of the image before the test.
      pieces: [Q] int32, number of pieces taken into account.
      counts: [Q,E] int32, events so far.
      num_bad: [Q] int32, samples whose output is not finite.
      answer: what the method knows by the test.
      done: [Q] bool.
    """

    images: Array
    indices: Array
    extra: PyTree
    pieces: Array
    counts: Array
    num_bad: Array
    answer: PyTree
    done: Array


def num_selection_pieces(n0: int, step: int) -> int:
    """Returns the number of pieces that n0 samples before the test take."""
    return math.ceil(n0 / step)


def num_pieces(method: Method) -> int:
    """Returns the number of pieces after which an image is done at the latest."""
    return num_selection_pieces(method.n0, method.step) + math.ceil(method.n / method.step)


def _sample_index(method, piece, offset):
    """Index of a sample from its piece and its place in there, and whether there is one."""
    selection = num_selection_pieces(method.n0, method.step)
    place = piece * method.step + offset
    tested = place - selection * method.step
    in_test = piece >= selection
    exists = jnp.where(in_test, tested < method.n, place < method.n0)
    return method.first + jnp.where(in_test, method.n0 + tested, place), exists


@functools.partial(
    jax.jit,
    static_argnames=("method", "mesh", "num_slots", "batch_size"),
    donate_argnames=("rows",),
)
def advance(
    model: PyTree,
    key: Key,
    tables: PyTree,
    rows: Rows,
    max_rounds: Array,
    low_water: Array,
    *,
    method: Method,
    mesh: Mesh,
    num_slots: int,
    batch_size: int,
) -> Rows:
    """Runs rounds until few images are left or enough rounds are done; see the module's text.

    Args:
      model: encoder or classifier, replicated.
      key: key of the run.
      tables: thresholds for `method.decide`, replicated.
      rows: images in flight; donated.
      max_rounds: integer scalar, rounds to do at most.
      low_water: integer scalar >= 1, number of undecided images to go on for.
      method: what to observe and how to decide.
      mesh: mesh of `ur_jax.devices.data_mesh`.
      num_slots: pieces per round.
      batch_size: samples per device and forward pass.

    Returns:
      The rows after the rounds.
    """
    num_items = num_slots * method.step
    num_batches = math.ceil(num_items / (mesh.size * batch_size))
    slots = jnp.arange(num_slots)

    def count(model, key, rows, row_of_slot, piece_of_slot):
        """Counts per slot, [num_slots, E + 1], over this device's share of the block."""
        device = jax.lax.axis_index(DATA_AXIS)

        def batch(b, totals):
            item = (b * mesh.size + device) * batch_size + jnp.arange(batch_size)
            slot = jnp.minimum(item // method.step, num_slots - 1)
            sample, exists = _sample_index(method, piece_of_slot[slot], item % method.step)
            exists &= item < num_items
            row = row_of_slot[slot]
            noisy = noisy_samples(
                rows.images[row],
                key,
                rows.indices[row],
                sample,
                sigma=method.sigma,
                clip=method.clip,
                noise=method.noise,
            )
            extra = jax.tree.map(lambda x: x[row], rows.extra)
            events, finite = method.observe(model, extra, noisy)
            events = jnp.where(finite[:, None], events, 0)
            observed = jnp.concatenate([events, (~finite)[:, None].astype(jnp.int32)], axis=1)
            return totals.at[slot].add(jnp.where(exists[:, None], observed, 0))

        totals = jnp.zeros((num_slots, method.num_events + 1), jnp.int32)
        return jax.lax.fori_loop(0, num_batches, batch, totals)

    def one_round(model, key, tables, rows):
        undecided = ~rows.done
        active = jnp.minimum(undecided.sum(), num_slots)
        rank = jnp.cumsum(undecided) - 1  # place of an undecided row among the undecided
        queue = jnp.argsort(rows.done, stable=True)
        row_of_slot = queue[slots % active]
        piece_of_slot = rows.pieces[row_of_slot] + slots // active
        share = count(model, key, rows, row_of_slot, piece_of_slot)
        totals = jax.lax.psum(share, DATA_AXIS)

        def take(depth, rows):
            """Takes one more piece of each image into account."""
            slot = rank + depth * active
            takes = undecided & ~rows.done & (rank < active) & (slot < num_slots)
            news = totals[jnp.clip(slot, 0, num_slots - 1)]
            further = rows._replace(
                pieces=rows.pieces + 1,
                counts=rows.counts + news[:, :-1],
                num_bad=rows.num_bad + news[:, -1],
            )
            further = method.decide(tables, further)
            over = further.pieces >= num_pieces(method)
            further = further._replace(done=further.done | over | (further.num_bad > 0))
            keep = lambda new, old: jnp.where(takes.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            return jax.tree.map(keep, further, rows)

        # The images are set aside: they take no part in the decisions.
        decided = jax.lax.fori_loop(0, -(-num_slots // active), take, rows._replace(images=None))
        return decided._replace(images=rows.images)

    def run(model, key, tables, rows, max_rounds, low_water):
        def go_on(carry):
            rows, rounds = carry
            return (rounds < max_rounds) & ((~rows.done).sum() >= low_water)

        def body(carry):
            rows, rounds = carry
            return one_round(model, key, tables, rows), rounds + 1

        return jax.lax.while_loop(go_on, body, (rows, jnp.int32(0)))[0]

    # Replication is not checked: a user's network may start a scan from constants.
    everywhere = PartitionSpec()
    return jax.shard_map(
        run, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )(model, key, tables, rows, max_rounds, low_water)


@functools.partial(jax.jit, donate_argnames=("rows",))
def _insert(rows, position, row):
    """Overwrites one row."""
    return jax.tree.map(lambda all_, one: all_.at[position].set(one), rows, row)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is left of an image's row when it is decided; host arrays.

    Attributes:
      index: index of the image.
      pieces: number of pieces taken into account.
      counts: [E] int32.
      num_bad: number of samples whose output is not finite.
      extra: as given with the image.
      answer: the method's answer.
    """

    index: int
    pieces: int
    counts: np.ndarray
    num_bad: int
    extra: PyTree
    answer: PyTree


def stream(
    model: PyTree,
    jobs: Iterable[tuple[int, Array, PyTree]],
    key: Key,
    *,
    method: Method,
    tables: PyTree,
    answer: PyTree,
    mesh: Mesh,
    batch_size: int,
    seconds: float = 2.0,
    on_progress: Callable[[int], Any] = lambda num_samples: None,
) -> Iterator[Outcome]:
    """Runs the sequential test of `method` on every image, in flight together.

    Args:
      model: encoder or classifier.
      jobs: (index, image [H,W,C] float32, extra) of each image, taken one by one as places free up.
      key: key of the run.
      method: what to observe and how to decide.
      tables: thresholds for `method.decide`.
      answer: the answer of an image before its first piece.
      mesh: mesh of `ur_jax.devices.data_mesh`.
      batch_size: samples per device and forward pass.
      seconds: time between two looks of the host, roughly.
      on_progress: called after each look with the number of samples evaluated since the last.

    Yields:
      The outcomes, in the order in which the images are decided.
    """
    num_slots = max(1, math.ceil(mesh.size * batch_size / method.step))
    capacity = max(2 * num_slots, 8)
    model, key, tables = replicate(mesh, (model, key, tables))
    run = functools.partial(
        advance, method=method, mesh=mesh, num_slots=num_slots, batch_size=batch_size
    )
    jobs = iter(jobs)
    head = next(jobs, None)
    if head is None:
        return
    jobs = itertools.chain([head], jobs)
    rows = _empty_rows(mesh, _fresh_row(method, *head, answer), capacity)
    free, more, rounds = list(range(capacity)), True, 1
    while True:
        while more and free:
            job = next(jobs, None)
            if job is None:
                more = False
                break
            row = _fresh_row(method, *job, answer)
            rows = _insert(rows, free.pop(0), replicate(mesh, row))
        if len(free) == capacity:
            return
        low_water = num_slots if more else 1
        before, started = np.array(rows.pieces), time.monotonic()
        rows = run(model, key, tables, rows, jnp.int32(rounds), jnp.int32(low_water))
        done = np.array(rows.done)  # the only wait for the device
        elapsed = time.monotonic() - started
        rounds = int(np.clip(rounds * seconds / max(elapsed, 1e-3), 1, min(4 * rounds, 10_000)))
        on_progress(int((np.asarray(rows.pieces) - before).sum()) * method.step)
        finished = [i for i in range(capacity) if done[i] and i not in free]
        if finished:
            host = jax.device_get(rows._replace(images=None))
            for i in finished:
                free.append(i)
                at = jax.tree.map(operator.itemgetter(i), host)
                yield Outcome(
                    int(at.indices), int(at.pieces), at.counts, int(at.num_bad), at.extra, at.answer
                )


def _fresh_row(method, index, image, extra, answer):
    """One image's row before its first piece."""
    return Rows(
        images=jnp.asarray(image, jnp.float32),
        indices=jnp.int32(index),
        extra=jax.tree.map(jnp.asarray, extra),
        pieces=jnp.int32(0),
        counts=jnp.zeros(method.num_events, jnp.int32),
        num_bad=jnp.int32(0),
        answer=jax.tree.map(jnp.asarray, answer),
        done=jnp.bool_(False),
    )


def _empty_rows(mesh, row, capacity):
    """Rows of the shape of `row` that are all done."""
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)
    return replicate(mesh, rows._replace(done=jnp.ones(capacity, bool)))
