"""Robustness of representation encoders, measured, certified and improved without labels."""

import importlib.metadata

from ur_jax import _begin  # noqa: F401  first: what follows takes seconds
from ur_jax.attacks import AttackConfig, loss_pgd, u_fgsm, u_pgd
from ur_jax.encoders import Encoder, from_fn, from_linen, from_nnx
from ur_jax.encoders.loading import load_encoder, save_encoder, weights_hash
from ur_jax.encoders.zoo import list_encoders

__version__ = importlib.metadata.version("ur_jax")

__all__ = [
    "__version__",
    "AttackConfig",
    "Encoder",
    "from_fn",
    "from_linen",
    "from_nnx",
    "list_encoders",
    "load_encoder",
    "loss_pgd",
    "save_encoder",
    "u_fgsm",
    "u_pgd",
    "weights_hash",
]
