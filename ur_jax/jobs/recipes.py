"""How encoder "demo" is fine-tuned at CIFAR scale, by name."""

from __future__ import annotations

import dataclasses

from ur_jax.errors import UserError, unknown_name
from ur_jax.jobs.train import PRESETS, Train
from ur_jax.training import ATTACKS, LoreConfig


def recipe(name: str) -> Train:
    """How encoder "demo" is fine-tuned by an attack of MoCo v2, or by fare, lore or simclip.

    Args:
      name: one of these; of lore also with its rho, lore@0.02.

    Raises:
      UserError: for another name.
    """
    own = ("fare", "lore", "simclip")
    kind, has_rho, rho = name.partition("@")
    if name in own:
        made, rate = PRESETS[name], 1e-3
    elif kind == "lore" and has_rho:
        try:
            method = LoreConfig(rho=float(rho))
        except ValueError:
            raise UserError(f"Expected lore@RHO with a number above 0, got {name!r}.") from None
        made, rate = dataclasses.replace(PRESETS[kind], method=method), 1e-3
    elif name in ATTACKS:
        made, rate = Train(attack=name), 0.03  # pyright: ignore[reportArgumentType]
    else:
        raise unknown_name("fine-tuning", name, (*ATTACKS, *own))
    return dataclasses.replace(made, init="demo", warmup_epochs=0.1, learning_rate=rate)
