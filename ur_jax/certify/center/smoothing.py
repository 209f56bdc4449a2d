"""Center smoothing (Kumar and Goldstein 2021): a certified divergence radius for any encoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from ur_jax.certify.center.adaptive import adaptive
from ur_jax.certify.center.certificate import CenterCertificate
from ur_jax.certify.center.config import CenterConfig
from ur_jax.certify.center.fixed import fixed
from ur_jax.certify.enclosing import Center, enclose
from ur_jax.certify.inputs import check_arguments, paired
from ur_jax.certify.sampling import sample_outputs
from ur_jax.checks import check_type
from ur_jax.devices import data_mesh, replicate
from ur_jax.encoders.base import Encoder
from ur_jax.types import Array, Image, Images, Key


def center_smoothing(
    encoder: Encoder,
    images: Iterable[Image] | Images,
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
    smallest: its ball has at most twice the smallest radius (hence 3 = 1 + 2). But for "hoeffding",
    eps_out is rounded up by a factor of 1 + 2^-10, for the float32 of the distances.

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
    Nothing is joint over images, and two images of one index have the same noise: each certificate
    holds as said, but they fail together.

    "hoeffding" interpolates between two order statistics as the published code does. The inequality
    says nothing of an interpolated value; the bound holds where the lower one of the two is an
    exact bound as well, which the settings are checked for: the level is far above the exact one
    but for a handful of samples.

    Args:
      encoder: the encoder f, with images [B,H,W,3] in [0,1] to representations [B,D].
      images: images [H,W,3] float32 in [0,1], or one array [N,H,W,3]; taken as places free up.
      key: typed key of the run; noise depends on it, the index and the sample alone.
      config: the settings.
      indices: index of each image, which keys its noise; 0, 1, ... by default.
      mesh: devices to use; all local ones by default.
      batch_size: samples per device and forward pass; see `memory.fit_batch_size`.
      on_progress: called every few seconds with the number of samples since the last call.

    Returns:
      (index, certificate) of each image, an iterator: in the order of the images for the fixed
      bounds, as they are decided for the adaptive ones.

    Raises:
      UserError: for another model, settings or key, at once; for an image that is not [H,W,3] in
        [0,1], or without an index, where it is taken.

    Reference: Kumar and Goldstein (2021), Algorithms 1 and 2, Theorems 1 and 2; Voracek (2024).
    """
    check_type("encoder", encoder, Encoder)
    check_arguments(key, config, CenterConfig, mesh, batch_size)
    pairs = paired(images, indices, encoder, config.noise)
    mesh = mesh or data_mesh()
    encoder, key = replicate(mesh, (encoder, key))
    first_stage = functools.partial(
        find_center, encoder, key, config=config, mesh=mesh, batch_size=batch_size
    )

    def centered():
        for index, image in pairs:
            image = replicate(mesh, jnp.asarray(image, jnp.float32))
            yield index, image, first_stage(image, index)
            on_progress(config.n0)

    run = adaptive if config.adaptive else fixed
    return run(encoder, centered(), key, config, mesh, batch_size, on_progress)


def _represent(encoder, images):
    """Representations; a function object that stays the same."""
    return encoder(images)


def find_center(
    encoder: Encoder, key: Key, image: Array, index: int, *, config: CenterConfig, mesh: Mesh,
    batch_size: int,
) -> Center:  # fmt: skip
    """First stage: the center of an image, its radius and the estimate of the quantile."""
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
        noise=config.noise,
        mesh=mesh,
        batch_size=batch_size,
    )
    rank = jnp.int32(min(math.ceil(config.level * config.n0), config.n0))
    return enclose(encoder, image, representations, rank, divergence=config.divergence, mesh=mesh)
