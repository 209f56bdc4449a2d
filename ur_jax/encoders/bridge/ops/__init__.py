"""The table of operations: ATen's name, and a few lines of JAX.

A row is a function whose arguments have the names of the ATen schema, which it is registered with;
`tests/encoders/bridge/test_ops.py` holds each to PyTorch's own result. Tensors are JAX arrays (or numbers:
ATen's tensors without axes), sizes are integers. Rows named `ur.` are ours, which passes put in.
"""

from ur_jax.encoders.bridge.ops import (  # noqa: I001  each registers its rows
    elementwise,
    neural,
    reductions,
    resampling,
    shapes,
    sizes,
)
from ur_jax.encoders.bridge.ops.table import ROWS, SCHEMAS

__all__ = [
    "ROWS",
    "SCHEMAS",
    "elementwise",
    "neural",
    "reductions",
    "resampling",
    "shapes",
    "sizes",
]
