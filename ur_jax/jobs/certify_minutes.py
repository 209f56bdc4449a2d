"""How many images are certified in some minutes, by the most samples that an image may take."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from ur_jax import devices
from ur_jax.devices import hosts
from ur_jax.jobs import minutes, parts

if TYPE_CHECKING:
    from ur_jax.jobs.certify import Certify

_PER_DEVICE = 16  # noisy images of the forward pass that is timed
_NUM_PROGRAMS = 2


def fitting(job: Certify, mesh: Mesh) -> int:
    """The most images whose certificates fit into the job's minutes, the same on all hosts.

    Images whose certificate is decided early leave time over.

    Args:
      job: with its encoder loaded, its images listed and its minutes.
      mesh: this host's devices.

    Raises:
      UserError: if not even the fewest images fit.
    """
    assert job.minutes is not None
    begin, total, size = time.monotonic(), len(job.source()), _PER_DEVICE * mesh.size
    noise = np.random.default_rng(0).random((size, *job.model.input_size, 3), np.float32)
    images, encoder = devices.shard(mesh, noise), devices.replicate(mesh, job.model)
    speed = minutes.speed(lambda: parts.encode(encoder, images), size)
    spent = time.monotonic() - begin
    budget = minutes.Budget(job.minutes, spent, _NUM_PROGRAMS, speed, jax.process_count())
    clean = min(total, job.num_distribution)
    cost = job.samples / min(job.num_images, total)
    fit = min(total, max(0, int((budget.samples - clean) / cost)))
    fit = int(hosts.on_all_hosts(fit).min())
    fewest = min(minutes.FEWEST, total)
    if fit < fewest:
        samples = clean + fewest * cost
        raise minutes.too_few(budget, samples, fewest, "fewer samples an image (n, n0)")
    minutes.tell(budget, clean + fit * cost, f"{fit:,} certified images")
    return fit
