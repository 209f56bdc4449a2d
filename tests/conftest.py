"""Eight CPU devices, strict dtype promotion, full-precision products, and the shared data."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

_SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """The reference outputs and the test data that lie beside the checkout."""
    if not _SHARED.is_dir():
        pytest.skip(f"needs the reference data, expected beside the checkout in {_SHARED.name}/")
    return _SHARED


@pytest.fixture(scope="session")
def golden(shared_dir):
    """Reads one file of reference outputs: golden("mocov2.npz")."""
    return lambda name: np.load(shared_dir / "golden" / name)


@pytest.fixture(scope="session")
def mocov2_encoder(shared_dir):
    """The MoCo v2 encoder with the reference outputs' synthetic weights."""
    import json

    import reference_rules

    from ur_jax import loading, weights
    from ur_jax.encoders.published import ENCODERS

    layout = json.loads((shared_dir / "golden" / "mocov2.layout.json").read_text())
    spec = ENCODERS["mocov2"]
    published = weights.map_tensors(reference_rules.state_dict(layout), spec)
    return loading.make_encoder(spec, published.variables, published.config)
