"""Attacks on representations: U-FGSM, U-PGD, L-PGD, APGD, Square and more, over one loop.

Every attack is random start -> gradient -> step -> project, and returns images; it changes nothing
else. A norm changes the `ball`, a step rule (`rules`, `apgd`, `momentum`, `square`) how a gradient
becomes a step, an objective (`objectives`) what grows; the loop (`ascent`) is one. Gradients are
with respect to the images only.

Images must lie in [0,1]. The result lies in the ball around the ORIGINAL image and in [0,1], to one
float32 ulp.

Reference: Petrov & Kwiatkowska 2022, "Robustness of Unsupervised Representation Learning without
Labels" (arXiv:2210.04076), section 3; Madry et al. 2018 for PGD.
"""

from ur_jax.attacks.apgd import Apgd
from ur_jax.attacks.ascent import Health, best_until
from ur_jax.attacks.ball import NORMS, image_keys, project
from ur_jax.attacks.config import AttackConfig, fgsm_config
from ur_jax.attacks.expectation import apply_transformed, eot_pgd
from ur_jax.attacks.loss import LossAttackResult, loss_pgd
from ur_jax.attacks.momentum import Momentum
from ur_jax.attacks.objectives import OBJECTIVES, Aim, Neighbour, Objective
from ur_jax.attacks.patch import PatchConfig, patch_attack, patch_mask
from ur_jax.attacks.rules import RULES, Point, StepRule
from ur_jax.attacks.square import Square
from ur_jax.attacks.strong import StrongConfig, StrongResult, strong
from ur_jax.attacks.transfer import ensemble, transfer_matrix
from ur_jax.attacks.universal import perturbed, universal_perturbation
from ur_jax.attacks.unsupervised import (
    AttackHistory,
    AttackResult,
    random_start,
    u_fgsm,
    u_pgd,
)

__all__ = [
    "NORMS",
    "OBJECTIVES",
    "RULES",
    "Aim",
    "Apgd",
    "AttackConfig",
    "AttackHistory",
    "AttackResult",
    "Health",
    "LossAttackResult",
    "Momentum",
    "Neighbour",
    "Objective",
    "PatchConfig",
    "Point",
    "Square",
    "StepRule",
    "StrongConfig",
    "StrongResult",
    "apply_transformed",
    "best_until",
    "ensemble",
    "eot_pgd",
    "fgsm_config",
    "image_keys",
    "loss_pgd",
    "patch_attack",
    "patch_mask",
    "perturbed",
    "project",
    "random_start",
    "strong",
    "transfer_matrix",
    "u_fgsm",
    "u_pgd",
    "universal_perturbation",
]
