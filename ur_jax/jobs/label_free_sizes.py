"""How many images the label-free job takes: at once what memory holds, in all what time allows."""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax import devices
from ur_jax.attacks import u_pgd
from ur_jax.data import evenly_spaced
from ur_jax.devices import hosts, memory
from ur_jax.encoders.base import Encoder
from ur_jax.jobs import minutes
from ur_jax.jobs.label_free_config import EvaluationConfig

if TYPE_CHECKING:
    from ur_jax.jobs.label_free import LabelFree

_BANK_SHARE = 0.15  # of the time, at most, for clean images that attacked ones are looked up among
_STEPS = 2  # of the attack that is timed
_MANY = 8  # batches, from which on larger ones are tried
_SMALL = 3  # images per device of a batch on a CPU, where larger ones are hardly faster
_PROGRAMS = {"distances": 0, "attacks": 2, "overlap": 1, "breakaway": 1, "strongest": 6}
_SIZES = ("num_images", "num_clean", "batch_size")


def fit_batch_size(
    config: EvaluationConfig, encoder: Encoder, mesh: Mesh, num_hosts: int = 1
) -> int:
    """Images per batch: as many as an attack on them has room for, on all devices of a mesh.

    Args:
      config: the protocol.
      encoder: the encoder.
      mesh: a host's devices.
      num_hosts: how many there are; a batch is no larger than a host's share of attacked images.
    """
    attack = config.attack(max(config.eps), 2)  # its memory does not grow with its steps
    attacked = lambda encoder, images: u_pgd(
        encoder, images, jax.random.key(0), config=attack,
        bank=jnp.ones((8, encoder.dimension)) if config.needs_bank else None,
    )  # fmt: skip
    share = math.ceil(config.num_images / (num_hosts * mesh.size))
    most = memory.fit_batch_size(attacked, encoder, (*encoder.input_size, 3), num_images=share)
    return mesh.size * min(most, share)


def check_fits(config: EvaluationConfig, num_images: int, mesh: Mesh) -> None:
    """Raises UserError for more samples than images, or a batch that the devices can't divide."""
    if config.batch_size is not None:  # it is found on the machine otherwise
        devices.check_divisible(config.batch_size, mesh)
    for what in ("num_images", "num_clean"):
        wanted = getattr(config, what)
        evenly_spaced(num_images, num_images if wanted is None else wanted, what=what)


def begun_with(protocol: EvaluationConfig, begun: Mapping[str, Any]) -> EvaluationConfig:
    """The protocol with the sizes of the run that goes on, by the identity that it began with."""
    before = begun.get("protocol", {})
    return dataclasses.replace(protocol, **{k: before[k] for k in _SIZES if k in before})


class _Sizes(NamedTuple):
    """Images attacked, of the bank, and of a batch over all devices of a host."""

    num_images: int
    num_clean: int
    batch_size: int


def fitting(job: LabelFree, mesh: Mesh) -> EvaluationConfig:
    """The protocol with as many images as fit into the job's minutes, the same on all hosts.

    Args:
      job: with its encoder loaded, its images listed and its minutes.
      mesh: this host's devices.

    Raises:
      UserError: if not even the fewest images fit.
    """
    sizes, budget = _measured(job, mesh)
    sizes = _Sizes(*(int(hosts.on_all_hosts(size).min()) for size in sizes))
    fewest = min(minutes.FEWEST, len(job.source()))
    if sizes.num_images < fewest:
        least = sizes._replace(num_images=-(-fewest // sizes.batch_size) * sizes.batch_size)
        cheaper = "--preset fast, fewer --stages or --eps"
        raise minutes.too_few(budget, _samples(job, least), fewest, cheaper)
    what = f"{sizes.num_images:,} attacked and {sizes.num_clean:,} clean images"
    minutes.tell(budget, _samples(job, sizes), what)
    found = sizes._asdict()
    if sizes.num_clean == len(job.source()):
        found["num_clean"] = job.protocol.num_clean  # which may be None, for all
    return dataclasses.replace(job.protocol, **found)


def _measured(job: LabelFree, mesh: Mesh) -> tuple[_Sizes, minutes.Budget]:
    """What fits on this host, by the speed of an attack: of larger batches where they pay."""
    assert job.minutes is not None
    begin, num_hosts = time.monotonic(), jax.process_count()
    num_programs = 1 + sum(_PROGRAMS[stage] for stage in job.stages)
    most = job.protocol.batch_size or fit_batch_size(job.protocol, job.model, mesh, num_hosts)
    size = most if mesh.devices.flat[0].platform != "cpu" else min(most, _SMALL * mesh.size)
    while True:
        devices.check_divisible(size, mesh)
        speed = _speed(job, mesh, size)
        spent = time.monotonic() - begin
        budget = minutes.Budget(job.minutes, spent, num_programs, speed, num_hosts)
        sizes = _largest(job, budget, size)
        if size == most or sizes.num_images < _MANY * size:
            return sizes, budget
        size = min(most, 4 * size)


def _speed(job: LabelFree, mesh: Mesh, size: int) -> minutes.Speed:
    """Of an attack on a batch of noise: no image is decoded."""
    protocol, encoder = job.protocol, devices.replicate(mesh, job.model)
    noise = np.random.default_rng(0).random((size, *encoder.input_size, 3), np.float32)
    images = devices.shard(mesh, noise)
    bank = jnp.ones((8, encoder.dimension)) if protocol.needs_bank else None
    attack, key = protocol.attack(max(protocol.eps), _STEPS), jax.random.key(0)
    run = lambda: u_pgd(encoder, images, key, config=attack, bank=bank).objective
    cost = protocol.num_restarts * (_STEPS * job.step_cost + 2)  # the original, and the end
    return minutes.speed(run, size * cost)


def _largest(job: LabelFree, budget: minutes.Budget, size: int) -> _Sizes:
    """The most images whose batches fit; 0 if not even one batch does."""
    total = len(job.source())
    share = 1.0 if job.stages == ("distances",) else _BANK_SHARE
    clean = max(int(share * budget.samples), minutes.FEWEST)
    sizes = _Sizes(size, min(job.protocol.num_clean or total, clean), size)
    cost = lambda count: _samples(job, sizes._replace(num_images=count * size))
    counts = range(1, -(-total // size) + 1)
    fit = bisect.bisect_right(counts, budget.samples, key=cost)
    return sizes._replace(num_images=min(fit * size, total))


def _samples(job: LabelFree, sizes: _Sizes) -> int:
    """What so many images cost, in samples."""
    protocol = dataclasses.replace(job.protocol, **sizes._asdict())
    return dataclasses.replace(job, protocol=protocol).samples
