"""Training methods: one file each, which registers its settings in `METHODS`.

A new file here is found by itself. One outside the package is imported by `--plugin FILE.py`.
"""

import importlib
import pkgutil

from ur_jax.training.methods.base import METHODS, Epochs, MethodConfig, Start, check_dtype, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Epochs", "MethodConfig", "Start", "check_dtype", "register"]
