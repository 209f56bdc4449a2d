"""timm and transformers, imported where they are needed; a converted encoder needs neither."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
import sys
from types import ModuleType
from typing import Any

from ur_jax.errors import require

_kept: list[Any] = []  # a library's definitions end with it


def import_timm() -> ModuleType:
    """Imports timm, also where torchvision's extension does not load.

    timm imports torchvision, whose compiled operators (for detection, none of which a classifier
    uses) do not load beside another build of PyTorch than its own, such as the one for CPUs; then
    even its Python part raises. Their names are defined here first, without an implementation.

    Raises:
      MissingPackageError: without timm or PyTorch.
    """
    require("torch", "timm", "timm's networks")
    _complete_torchvision()
    return require("timm", "timm", "timm's networks")


def import_transformers() -> ModuleType:
    """Imports transformers.

    Raises:
      MissingPackageError: without transformers or PyTorch.
    """
    require("torch", "hf", "Networks of Hugging Face")
    _complete_torchvision()  # it looks whether torchvision is there
    return require("transformers", "hf", "Networks of Hugging Face")


def _complete_torchvision() -> None:
    """Defines the operators that torchvision's Python part registers shapes of, if they lack."""
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or spec is None or spec.origin is None:
        return
    try:
        importlib.import_module("torchvision")
        return
    except (RuntimeError, ImportError):
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    torch: Any = importlib.import_module("torch")
    registered = pathlib.Path(spec.origin).with_name("_meta_registrations.py").read_text()
    names = re.findall(r'register_meta\("(\w+)"', registered)
    names += re.findall(r'register_fake\("torchvision::(\w+)"', registered)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in dict.fromkeys(names):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor a) -> Tensor")
    _kept.append(library)
