"""How fast the library is on the device it finds, beside what the device could do, and PyTorch.

    python -m ur_jax.performance --preset gpu --against torch --out throughput.json

needs nothing but the core's own dependencies (and PyTorch, if it is compared with);
`ur-jax throughput` adds a table and a plot. `suite` says what is measured, `work` holds our
side of it, `torch_work` and `torch_networks` PyTorch's, `timing` the clock.
"""

from ur_jax.performance.suite import PRESETS, Result, Sweep, run

__all__ = ["PRESETS", "Result", "Sweep", "run"]
