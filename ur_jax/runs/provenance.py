"""What produced a result: commit, versions, devices, and the layout's version."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import jax

SCHEMA = 3
"""Version of the layout of `summary.json` (see `summary`) and of the tables."""

_PACKAGES = ("ur_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "pillow")


def provenance() -> dict[str, Any]:
    """What produced a result: schema, commit, versions, devices and precision of products."""
    devices = jax.devices()
    return {
        "schema": SCHEMA,
        "commit": _commit(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "matmul_precision": _matmul_precision(),
    }


def _matmul_precision() -> str:
    """Precision of products in float32."""
    return jax.config.jax_default_matmul_precision or "default"  # pyright: ignore


def _version(package: str) -> str:
    """Installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _commit() -> str:
    """Commit of the checkout that this package runs from; "unknown" outside one."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
