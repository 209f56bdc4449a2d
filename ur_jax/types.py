"""Names for the types that signatures share."""

from __future__ import annotations

from typing import Any

import jax

Array = jax.Array
Key = jax.Array
"""A typed PRNG key, `jax.random.key(seed)`."""
PyTree = Any
