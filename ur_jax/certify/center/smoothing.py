"""Center smoothing (Kumar and Goldstein 2021): a certified divergence radius for any encoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax.certify.center.adaptive import adaptive
from ur_jax.certify.center.certificate import CenterCertificate
from ur_jax.certify.center.config import CenterConfig
from ur_jax.certify.center.fixed import fixed
from ur_jax.certify.enclosing import Center, enclose
from ur_jax.certify.sampling import sample_outputs
from ur_jax.devices import data_mesh, replicate
from ur_jax.encoders.base import Encoder
from ur_jax.types import Array, Key


def center_smoothing(
    encoder: Encoder,
    images: Iterable[Array],
    key: Key,
    *,
    config: CenterConfig,
    indices: Iterable[int] | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int], Any] = lambda num_samples: None,
) -> Iterator[tuple[int, CenterCertificate]]:
    """Certifies how far the smoothed representation can move under inputs within eps_in.

        eps_out = 3 * bound on the p-quantile of d(z, f(x + noise)),
        p = Phi(Phi^-1(1/2 + delta) + eps_in / sigma)

    where the center z is the sample of f(x + noise) whose median distance to the others is
    smallest: its ball has at most twice the smallest radius (hence 3 = 1 + 2).

    **Guarantee.** *Per stage:* given z, with probability at least 1 - alpha2 over the fresh noise
    drawn at x, the ball about z of radius eps_out / 3 has probability at least 1/2 + delta under
    noise about every x' within eps_in of x, all x' together. Then eps_out covers every center with
    the defining property at x': a ball of at most twice the smallest radius for 1/2 + delta that
    holds 1/2 - delta. *Joint:* this procedure, run with its own noise at one x' that does not
    depend on the noise at x, finds such a center or abstains with probability at least 1 - alpha1.
    So with probability at least 1 - alpha1 - alpha2 over both draws, it abstains at x' or its
    center lies within eps_out of z. Where the check at x fails, it abstains there. For the adaptive
    bounds the same holds whatever the number of thresholds and whenever the test stopped:
    thresholds are nested, so a false one implies that one and the same sequence is crossed.
    Nothing is joint over images.

    "hoeffding" interpolates between order statistics as the published code does; its level is so
    far above the exact one that the lower neighbour is a valid bound too.

    Args:
      encoder: the encoder f, with images [B,H,W,3] in [0,1] to representations [B,D].
      images: images [H,W,3] float32 in [0,1], or one array [N,H,W,3]; taken as places free up.
      key: typed key of the run; noise depends on it, the index and the sample alone.
      config: the settings.
      indices: index of each image, which keys its noise; 0, 1, ... by default.
      mesh: devices to use; all local ones by default.
      batch_size: samples per device and forward pass; see `memory.fit_batch_size`.
      on_progress: called every few seconds with the number of samples since the last call.

    Yields:
      (index, certificate); in the order of the images for the fixed bounds, as they are decided for
      the adaptive ones.

    Reference: Kumar and Goldstein (2021), Algorithms 1 and 2, Theorems 1 and 2; Voracek (2024).
    """
    mesh = mesh or data_mesh()
    encoder, key = replicate(mesh, (encoder, key))
    indices = iter(indices) if indices is not None else iter(range(np.iinfo(np.int32).max))
    first_stage = functools.partial(
        _find_center, encoder, key, config=config, mesh=mesh, batch_size=batch_size
    )

    def centered():
        for image, index in zip(images, indices):  # no index is taken without an image
            image = replicate(mesh, jnp.asarray(image, jnp.float32))
            yield index, image, first_stage(image, index)
            on_progress(config.n0)

    run = adaptive if config.adaptive else fixed
    yield from run(encoder, centered(), key, config, mesh, batch_size, on_progress)


def _represent(encoder, images):
    """Representations; a function object that stays the same."""
    return encoder(images)


def _find_center(
    encoder: Encoder, key: Key, image: Array, index: int, *, config: CenterConfig, mesh: Mesh,
    batch_size: int,
) -> Center:  # fmt: skip
    """First stage: the center, its radius and the estimate of the quantile."""
    representations = sample_outputs(
        _represent,
        encoder,
        image,
        key,
        jnp.int32(index),
        jnp.int32(0),
        n=config.n0,
        sigma=config.sigma,
        clip=config.clip,
        mesh=mesh,
        batch_size=batch_size,
    )
    rank = jnp.int32(min(math.ceil(config.level * config.n0), config.n0))
    return enclose(encoder, image, representations, rank, divergence=config.divergence, mesh=mesh)
