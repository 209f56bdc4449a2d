"""Robustness of representation encoders, measured, certified and improved without labels.

    summary = ur_jax.evaluate("demo", "folder:photos")
    attacked = ur_jax.u_pgd(encoder, images, jax.random.key(0), config=ur_jax.AttackConfig())

What is here is imported when it is first used, and so are the rooms: `ur_jax.attacks`, `.metrics`,
`.certify`, `.data`, `.training` and the others.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from ur_jax import _begin  # noqa: F401  before what takes seconds to import

if TYPE_CHECKING:
    from ur_jax.attacks import AttackConfig, loss_pgd, u_fgsm, u_pgd
    from ur_jax.calls import compare, evaluate
    from ur_jax.encoders import Encoder, from_fn, from_linen, from_nnx
    from ur_jax.encoders.bridge import from_torch
    from ur_jax.encoders.loading import load_encoder, save_encoder, weights_hash
    from ur_jax.encoders.zoo import list_encoders

__version__ = importlib.metadata.version("ur_jax")

__all__ = [
    "__version__",
    "AttackConfig",
    "Encoder",
    "compare",
    "evaluate",
    "from_fn",
    "from_linen",
    "from_nnx",
    "from_torch",
    "list_encoders",
    "load_encoder",
    "loss_pgd",
    "save_encoder",
    "u_fgsm",
    "u_pgd",
    "weights_hash",
]

_ROOMS = {
    *("attacks", "certify", "data", "devices", "distances", "encoders", "jobs", "metrics"),
    *("performance", "probes", "report", "runs", "stats", "training"),
}
_PLACES = {
    **dict.fromkeys(("AttackConfig", "loss_pgd", "u_fgsm", "u_pgd"), "attacks"),
    **dict.fromkeys(("compare", "evaluate"), "calls"),
    **dict.fromkeys(("Encoder", "from_fn", "from_linen", "from_nnx"), "encoders"),
    **dict.fromkeys(("load_encoder", "save_encoder", "weights_hash"), "encoders.loading"),
    "from_torch": "encoders.bridge",
    "list_encoders": "encoders.zoo",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"ur_jax.{name}")
    if name in _PLACES:
        found = getattr(importlib.import_module(f"ur_jax.{_PLACES[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'ur_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
