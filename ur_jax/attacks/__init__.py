"""Unsupervised attacks: U-FGSM, U-PGD and L-PGD, over one projected-gradient core.

Every attack is random start -> gradient -> step -> project, and returns images; it changes nothing
else. A norm changes the `ball`, a step `rule` how a gradient becomes a step, an attack the
objective; the loop (`ascent`) is one. Gradients are with respect to the images only.

Images must lie in [0,1]. The result lies in the ball around the ORIGINAL image and in [0,1], to one
float32 ulp.

Reference: Petrov & Kwiatkowska 2022, "Robustness of Unsupervised Representation Learning without
Labels" (arXiv:2210.04076), section 3; Madry et al. 2018 for PGD.
"""

from ur_jax.attacks.ascent import Health
from ur_jax.attacks.ball import NORMS, image_keys, project
from ur_jax.attacks.config import AttackConfig, fgsm_config
from ur_jax.attacks.loss import LossAttackResult, loss_pgd
from ur_jax.attacks.rules import RULES, Point, StepRule
from ur_jax.attacks.unsupervised import (
    AttackHistory,
    AttackResult,
    random_start,
    u_fgsm,
    u_pgd,
)

__all__ = [
    "NORMS",
    "RULES",
    "AttackConfig",
    "AttackHistory",
    "AttackResult",
    "Health",
    "LossAttackResult",
    "Point",
    "StepRule",
    "fgsm_config",
    "image_keys",
    "loss_pgd",
    "project",
    "random_start",
    "u_fgsm",
    "u_pgd",
]
