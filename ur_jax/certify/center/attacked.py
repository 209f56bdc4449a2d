"""Certificates put to the test: is any certified image moved farther than its eps_out?"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax.attacks import AttackConfig, StrongConfig, eot_pgd, u_pgd
from ur_jax.certify.center.config import CenterConfig
from ur_jax.certify.center.smoothing import center_smoothing, find_center
from ur_jax.certify.inputs import check_arguments
from ur_jax.checks import check_type, whole_number
from ur_jax.devices import data_mesh, replicate
from ur_jax.distances import distance
from ur_jax.encoders.base import Encoder
from ur_jax.types import Array, Images, Key

_ATTACK = 0xA77AC  # the stream of the attacks and of the noise at what they found
_SAMPLES = 8  # of noise, at each step of the attack on their mean


class Attacked(NamedTuple):
    """What the attacks found, each (N,).

    Attributes:
      eps_out: certified divergence; infinite without a certificate.
      moved: the largest divergence of the smoothed representation at an attacked image from that
        at the image itself, over all attacks.
      attack: (N,) which one it was, a name of `ATTACKS`.
    """

    eps_out: np.ndarray
    moved: np.ndarray
    attack: np.ndarray

    @property
    def broken(self) -> np.ndarray:
        """Whether a certified image was moved farther than its certificate allows (N,)."""
        return self.moved > self.eps_out


ATTACKS = ("apgd-l2", "apgd-cosine", "apgd-targeted", "apgd-noise", "square")
"""By gradients on the encoder itself; on the mean over its noise; and without gradients."""


def attack_certified(
    encoder: Encoder,
    images: Images,
    key: Key,
    *,
    config: CenterConfig,
    num_steps: int = 20,
    indices: np.ndarray | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> Attacked:
    """Certifies images by center smoothing and attacks what was certified.

    Each attack stays within `eps_in` in l2 and within [0,1]; Square is inscribed, in linf. At what
    it found the smoothed representation is computed anew, with noise of its own.

    **Guarantee.** None: it is a test of one. A certificate that holds is broken on at most a share
    of alpha1 + alpha2 of the images by an attack that does not see the noise, up to chance.

    Args:
      encoder: the encoder.
      images: (N,H,W,3) float32 in [0,1], at least two.
      key: of the certificates, as in `center_smoothing`.
      config: of the certificates.
      num_steps: of each attack; Square has 10 queries for each.
      indices: of the images, which key their noise; 0, 1, ... by default.
      mesh, batch_size: as in `center_smoothing`.

    Returns:
      What was certified and how far each image was moved.

    Raises:
      UserError: as `center_smoothing` and `strong`.
    """
    check_type("encoder", encoder, Encoder)
    check_arguments(key, config, CenterConfig, mesh, batch_size)
    num_steps = whole_number(num_steps, "num_steps", least=1)
    mesh, images = mesh or data_mesh(), np.asarray(images, np.float32)
    given = np.arange(len(images)) if indices is None else np.asarray(indices)
    order = [int(index) for index in given]
    shared = {"mesh": mesh, "batch_size": batch_size}
    found = dict(center_smoothing(encoder, images, key, config=config, indices=order, **shared))
    whole, own, other = replicate(mesh, (encoder, key, jax.random.fold_in(key, _ATTACK)))
    center = functools.partial(find_center, whole, config=config, **shared)
    place = lambda image: replicate(mesh, jnp.asarray(image))
    centers = [center(own, place(x), i).center for x, i in zip(images, order)]
    moved = []
    for attacked in _attacked(encoder, images, other, order, config, num_steps):
        there = [center(other, place(x), i).center for x, i in zip(attacked, order)]
        pairs = zip(there, centers, strict=True)
        moved.append([float(distance(*pair, divergence=config.divergence)) for pair in pairs])
    far = np.where(np.isnan(moved), math.inf, moved)
    return Attacked(
        np.array([found[i].eps_out for i in order]),
        far.max(axis=0),
        np.array(ATTACKS)[far.argmax(axis=0)],
    )


def _attacked(
    encoder: Encoder, images: np.ndarray, key: Key, order: list[int], config: CenterConfig,
    num_steps: int,
) -> Iterator[Array]:  # fmt: skip
    """The images that each of `ATTACKS` makes, keyed by their own index."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = fold(key, jnp.asarray(order, jnp.uint32))
    eps = config.eps_in
    members = StrongConfig(eps, num_steps, 1, norm="l2").members
    clean = encoder(images)
    for name, attack in members.items():
        target = jnp.roll(clean, 1, axis=0) if name == "apgd-targeted" else None
        yield u_pgd(encoder, images, keys, config=attack, target=target).images
    noisy = AttackConfig(eps, eps, num_steps, "l2", rule="apgd")
    params = {"encoder": encoder, "sigma": jnp.float32(config.sigma)}
    yield eot_pgd(_under_noise, params, images, keys, config=noisy, num_samples=_SAMPLES).images
    inscribed = min(eps / math.sqrt(images[0].size), 1.0)
    square = AttackConfig(inscribed, inscribed, 10 * num_steps, rule="square")
    yield u_pgd(encoder, images, keys, config=square).images


def _under_noise(params, images, keys):
    """Representations of images with normal noise, for `eot_pgd`; inside jit pixels may leave
    [0,1]."""
    draw = lambda key: jax.random.normal(key, images.shape[1:], images.dtype)
    return params["encoder"](images + params["sigma"] * jax.vmap(draw)(keys))
