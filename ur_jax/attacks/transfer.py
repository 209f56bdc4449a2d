"""Several encoders at once: what is made on one, measured on another; and an ensemble.

Reference: Liu et al. 2017, "Delving into Transferable Adversarial Examples and Black-box Attacks"
(arXiv:1611.02770).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from ur_jax.attacks.ball import image_keys
from ur_jax.attacks.config import AttackConfig
from ur_jax.attacks.unsupervised import u_pgd
from ur_jax.checks import check_type
from ur_jax.encoders.base import Encoder, from_fn
from ur_jax.errors import UserError
from ur_jax.types import Array, Images, Keys, PyTree


def transfer_matrix(
    encoders: Mapping[str, Encoder], images: Images, key: Keys, *, config: AttackConfig
) -> dict[str, dict[str, np.ndarray]]:
    """How far what is attacked on one encoder moves the representations of another.

    Args:
      encoders: {name: encoder}, all of one input size.
      images: originals (B,H,W,3) float32 in [0,1].
      key: as in `u_pgd`.
      config: the attack, an untargeted one without a bank.

    Returns:
      {made on: {measured on: l2 distances (B,)}}. Distances of two encoders compare after each is
      divided by its own median clean distance (`metrics.normalised_distance`).

    Raises:
      UserError: as `u_pgd`, or for encoders of several sizes.
    """
    _check_one_size(tuple(encoders.values()))
    keys = image_keys(key, len(images))
    found: dict[str, dict[str, np.ndarray]] = {}
    for made_on, encoder in encoders.items():
        attacked = u_pgd(encoder, images, keys, config=config).images
        found[made_on] = {
            name: np.linalg.norm(np.asarray(other(attacked) - other(jnp.asarray(images))), axis=1)
            for name, other in encoders.items()
        }
    return found


def ensemble(encoders: Sequence[Encoder], scales: Sequence[float], name: str = "ensemble"):
    """An encoder whose representation is that of all, one after the other, each over its scale.

    Its squared l2 distances are sums of those of its members, so that an attack on it is one on all
    of them at once.

    Args:
      encoders: all of one input size, at least two.
      scales: what each representation is divided by, > 0, such as its median clean distance.
      name: in tables.

    Returns:
      The encoder, of dimension D_1 + D_2 + ...

    Raises:
      UserError: for encoders of several sizes, or scales that are none.
    """
    encoders = tuple(encoders)
    _check_one_size(encoders)
    values = np.asarray(scales, np.float32)
    if values.shape != (len(encoders),) or not np.all(np.isfinite(values) & (values > 0)):
        raise UserError(f"Expected a scale > 0 for each of {len(encoders)} encoders, got {scales}.")
    first = encoders[0]
    made = from_fn(_constant, (), input_size=first.input_size, preparation=first.preparation)
    return made.replace(
        params=(encoders, jnp.asarray(values)),
        apply_fn=_all_of_them,
        name=name,
        dimension=sum(encoder.dimension for encoder in encoders),
    )


def _all_of_them(params: PyTree, images: Array) -> Array:
    """The representations of all members, scaled."""
    encoders, scales = params
    each = [encoder(images) / scale for encoder, scale in zip(encoders, scales)]
    return jnp.concatenate(each, axis=-1)


def _constant(params, images):
    """Stands in while the members are put together."""
    return images.mean((1, 2))


def _check_one_size(encoders: Sequence[Encoder]) -> None:
    """Refuses what cannot look at the same images."""
    for encoder in encoders:
        check_type("encoder", encoder, Encoder)
    if len(sizes := {encoder.input_size for encoder in encoders}) != 1:
        raise UserError(f"Expected encoders of one input size, got {sorted(sizes)}.")
