"""Robustness of representation encoders, measured, certified and improved without labels."""

from ur_jax.attacks import AttackConfig, loss_pgd, u_fgsm, u_pgd
from ur_jax.encoders import Encoder, from_fn
from ur_jax.encoders.published import list_encoders
from ur_jax.loading import load_encoder, weights_hash

__all__ = [
    "AttackConfig",
    "Encoder",
    "from_fn",
    "list_encoders",
    "load_encoder",
    "loss_pgd",
    "u_fgsm",
    "u_pgd",
    "weights_hash",
]
