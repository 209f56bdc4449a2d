"""The published encoders: a file each, with its spec and its table of tensors.

A new file here is found by itself. One outside the package registers its spec likewise, and is
imported by `--plugin FILE.py`.
"""

import importlib
import pkgutil

from ur_jax.encoders.zoo.spec import ENCODERS, EncoderSpec, Rule, TrainingPart, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def list_encoders() -> tuple[str, ...]:
    """Returns the names of the encoders whose published files `load_encoder` knows."""
    return tuple(ENCODERS)


__all__ = ["ENCODERS", "EncoderSpec", "Rule", "TrainingPart", "list_encoders", "register"]
