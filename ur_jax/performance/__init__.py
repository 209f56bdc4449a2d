"""How fast the library is on the device it finds, beside what the device could do, and PyTorch.

    python -m ur_jax.performance --preset gpu --against torch --out throughput.json

needs nothing but the core's own dependencies (and PyTorch, if it is compared with);
`ur-jax throughput` adds a table and a plot. `sweeps` says what is measured and `suite` measures
it, `work` holds our side, `torch_work` and `torch_networks` PyTorch's, `timing` the clock.
"""

from ur_jax.performance.suite import Result, run
from ur_jax.performance.sweeps import PRESETS, Sweep

__all__ = ["PRESETS", "Result", "Sweep", "run"]
