"""Any PyTorch module as a pure JAX function.

    encoder = from_torch(module, input_size=(224, 224), mean=..., std=...)

`export` makes a graph of plain data of the module, `passes` make it fast, `function` evaluates it
by the rows of `ops`, and `checkpoint` keeps it. Only `export` needs PyTorch.
"""

from ur_jax.encoders.bridge.function import GraphFn
from ur_jax.encoders.bridge.module import from_torch, state_dict

__all__ = ["GraphFn", "from_torch", "state_dict"]
