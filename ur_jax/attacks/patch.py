"""A patch: some pixels may take any value, the others stay.

Reference: Brown et al. 2017, "Adversarial Patch" (arXiv:1712.09665).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ur_jax.attacks.ascent import ascend
from ur_jax.attacks.ball import image_keys
from ur_jax.attacks.config import AttackConfig, split
from ur_jax.attacks.objectives import OBJECTIVES, Aim
from ur_jax.attacks.unsupervised import AttackHistory, AttackResult
from ur_jax.checks import check_finite_array, check_type, check_whole
from ur_jax.distances import all_distances
from ur_jax.encoders.base import Encoder, check_images
from ur_jax.errors import UserError, unknown_name
from ur_jax.typed import check_types
from ur_jax.types import Array, Images, Keys, Representations

SHAPES = ("rectangle", "ellipse")
_PLACE = 0x91ACE  # the stream of places


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """Where a patch is, and how it is attacked.

    Attributes:
      height, width: of the patch, in pixels, >= 1.
      place: row and column of its upper left corner; None for a random one for each image.
      shape: "rectangle" or "ellipse" (the one inside the rectangle).
      num_steps: of the attack.
      rule: a step rule of linf; the ball is all of [0,1].
      objective: as in `AttackConfig`, without a bank.

    Raises:
      UserError: for a value out of range.
    """

    height: int = 8
    width: int = 8
    place: tuple[int, int] | None = None
    shape: str = "rectangle"
    num_steps: int = 50
    rule: str = "apgd"
    objective: str = "l2"

    def __post_init__(self):
        check_types(self)
        check_whole(self, "height", "width", "num_steps")
        if self.place is not None and min(self.place) < 0:
            raise UserError(f"Expected place (row, column) >= 0, got {self.place}.")
        if self.shape not in SHAPES:
            raise unknown_name("shape", self.shape, SHAPES)
        if getattr(OBJECTIVES[self.objective](), "needs_bank", False):
            raise UserError(f"Expected an objective without a bank, got {self.objective!r}.")
        _ = self.attack

    @property
    def attack(self) -> AttackConfig:
        """The attack inside the patch: any pixel of [0,1]."""
        return AttackConfig(1.0, 0.1, self.num_steps, rule=self.rule, objective=self.objective)


def patch_attack(
    encoder: Encoder,
    images: Images,
    key: Keys,
    *,
    config: PatchConfig,
    target: Representations | None = None,
) -> AttackResult:
    """Moves representations by the pixels of a patch alone, which may take any value in [0,1].

    Args:
      encoder: the encoder f.
      images: originals (B,H,W,3) float32 in [0,1].
      key: as in `u_pgd`; it also draws the places.
      config: the patch; its size and shape are static.
      target: representations (B,D) to move towards; by default away from f(x).

    Returns:
      As `u_pgd`; pixels outside the patch are those of the originals, bit for bit.

    Raises:
      UserError: as `u_pgd`, or for a patch that is not inside the images.
    """
    check_type("encoder", encoder, Encoder)
    check_type("config", config, PatchConfig)
    check_images(encoder, images)
    row, column = config.place or (0, 0)
    if row + config.height > images.shape[1] or column + config.width > images.shape[2]:
        raise UserError(
            f"Expected a patch inside {images.shape[1]} x {images.shape[2]} pixels, got one of "
            f"{config.height} x {config.width} at {config.place}."
        )
    if target is not None:
        check_finite_array("target", target, (len(images), encoder.dimension))
    return _patch_attack(encoder, images, image_keys(key, len(images)), target, config)


def patch_mask(keys: Array, size: tuple[int, int], config: PatchConfig) -> Array:
    """The pixels of each image's patch, (B,H,W,1) bool."""
    lengths = config.height, config.width

    def mask(key):
        axes = []
        for axis, (pixels, length) in enumerate(zip(size, lengths)):
            if config.place is None:
                own = jax.random.fold_in(jax.random.fold_in(key, _PLACE), axis)
                first = jax.random.randint(own, (), 0, pixels - length + 1)
            else:
                first = config.place[axis]
            offset = (jnp.arange(pixels) - first).astype(jnp.float32)
            axes.append((2.0 * offset + 1.0 - length) / length)  # -1 to 1 inside
        rows, columns = axes[0][:, None], axes[1][None, :]
        if config.shape == "ellipse":
            return rows**2 + columns**2 <= 1.0
        return (jnp.abs(rows) < 1.0) & (jnp.abs(columns) < 1.0)

    return jax.vmap(mask)(keys)[..., None]


@functools.partial(jax.jit, static_argnames="config")
def _patch_attack(encoder, images, keys, target, config) -> AttackResult:
    """`patch_attack` without the checks."""
    reference = jax.lax.stop_gradient(encoder(images) if target is None else target)
    aim, objective_of = Aim(reference, target is not None), OBJECTIVES[config.objective]()

    def objective_fn(attacked, draws):
        representations = encoder(attacked)
        return objective_of(representations, aim), representations

    record_fn = lambda representations: all_distances(representations, reference)
    mask = patch_mask(keys, images.shape[1:3], config)
    end = ascend(objective_fn, record_fn, images, keys, *split(config.attack), mask=mask)
    history = AttackHistory._make((*end.records, *end.norms, end.objectives))
    return AttackResult(end.images, end.output, end.objective, history, end.health)
