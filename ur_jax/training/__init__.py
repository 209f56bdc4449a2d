"""Self-supervised and adversarial training: one state, one pure step; a method is its loss.

    method = MocoV2(network, mean, std)            # or MocoV3(...), or Fare(encoder)
    adversary = Adversary("untargeted")            # or "targeted", "loss"; None for plain training
    state = init_state(method, variables, optimizer, key)
    state, metrics, samples = train_step(method, optimizer, adversary, state, views, key)

`loop.train` runs it over a data set, with checkpoints, and resumes bit for bit.
"""

from ur_jax.training.methods.fare import Fare
from ur_jax.training.methods.moco import MocoV2, MocoV3
from ur_jax.training.optimizers import adamw, cosine_schedule, momentum_schedule, sgd, trained_mask
from ur_jax.training.step import (
    ATTACKS,
    Adversary,
    Method,
    TrainState,
    Views,
    init_state,
    train_step,
)

__all__ = [
    "ATTACKS",
    "Adversary",
    "Fare",
    "Method",
    "MocoV2",
    "MocoV3",
    "TrainState",
    "Views",
    "adamw",
    "cosine_schedule",
    "init_state",
    "momentum_schedule",
    "sgd",
    "trained_mask",
    "train_step",
]
