"""Self-supervised and adversarial training: one state, one pure step; a method is its loss.

    method = MocoV2(network, mean, std)            # or MocoV3(...), or Fare.of(encoder), ...
    adversary = Adversary("untargeted")            # or "targeted", "loss"; None for plain training
    state = init_state(method, variables, optimizer, key)
    state, metrics, samples = train_step(method, optimizer, adversary, state, views, key)

`loop.train` runs it over a data set, with checkpoints, and resumes bit for bit.
"""

from ur_jax.training.methods import METHODS, MethodConfig, Start, check_dtype
from ur_jax.training.methods.fare import Fare, FareConfig
from ur_jax.training.methods.lore import Lore, LoreConfig
from ur_jax.training.methods.mocov2 import MocoV2, MocoV2Config
from ur_jax.training.methods.mocov3 import MocoV3, MocoV3Config
from ur_jax.training.methods.simclip import SimClip, SimClipConfig
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
    "METHODS",
    "Adversary",
    "Fare",
    "FareConfig",
    "Lore",
    "LoreConfig",
    "Method",
    "MethodConfig",
    "MocoV2",
    "MocoV2Config",
    "MocoV3",
    "MocoV3Config",
    "SimClip",
    "SimClipConfig",
    "Start",
    "TrainState",
    "Views",
    "adamw",
    "check_dtype",
    "cosine_schedule",
    "init_state",
    "momentum_schedule",
    "sgd",
    "trained_mask",
    "train_step",
]
