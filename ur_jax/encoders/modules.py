"""Encoders of Flax modules, of both kinds: linen and nnx."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn

from ur_jax.encoders.base import Encoder, from_fn
from ur_jax.errors import UserError
from ur_jax.types import Array, PyTree

if TYPE_CHECKING:
    from flax import nnx  # takes half as long as JAX

_INFERENCE = {
    **dict.fromkeys(("train", "training", "is_training"), False),
    **dict.fromkeys(("deterministic", "use_running_average", "eval"), True),
}
"""What modules call their training mode, and the value that ends it."""


def from_linen(
    module: nn.Module,
    variables: PyTree,
    *,
    keywords: Mapping[str, Hashable] | None = None,
    method: str | Callable | None = None,
    **settings: Any,
) -> Encoder:
    """Makes an encoder of a Flax linen module, in inference mode.

    Equal modules give equal functions, which are compiled once; a module with a list or an array
    among its fields is equal only to itself.

    Args:
      module: the module, which maps normalised images (B,H,W,3) to (B,D).
      variables: what `module.init` returns, trained: {"params": ..., "batch_stats": ...}.
      keywords: further arguments of its call. Without any, a parameter named train, training,
        is_training (False), deterministic, use_running_average or eval (True) is set for inference.
      method: the method to call, or its name, instead of `__call__`.
      **settings: as in `from_fn`: input_size, name, preparation, mean, std, representation, dtype.

    Returns:
      The encoder.

    Raises:
      UserError: as `from_fn`; for an nnx module.
    """
    if not isinstance(module, nn.Module):
        raise UserError(
            f"Expected a flax.linen module, got {type(module).__name__}; `from_nnx` takes nnx "
            "modules, `from_fn` any function."
        )
    called = getattr(module, method) if isinstance(method, str) else method or module.__call__
    if keywords is None:
        takes = inspect.signature(called).parameters
        keywords = {name: value for name, value in _INFERENCE.items() if name in takes}
    name = method if isinstance(method, str) else getattr(method, "__name__", "__call__")
    if isinstance(module, nn.Sequential):
        module = module.clone(layers=tuple(module.layers))  # a list has no hash
    kept = module if _is_hashable(module) else _Itself(module)
    apply_fn = LinenFn(kept, name, tuple(sorted(keywords.items())))
    return from_fn(apply_fn, variables, **{"name": type(module).__name__, **settings})


def from_nnx(model: nnx.Module, **settings: Any) -> Encoder:
    """Makes an encoder of a Flax nnx module, in inference mode.

    The encoder has a copy of the model with `eval()` called on it: Dropout is off and BatchNorm
    uses its running statistics, whatever the mode of the model itself, which stays as it is.

    Args:
      model: the module, which maps normalised images (B,H,W,3) to (B,D).
      **settings: as in `from_fn`: input_size, name, preparation, mean, std, representation, dtype.

    Returns:
      The encoder; its parameters are the model's state, but for random number generators.

    Raises:
      UserError: as `from_fn`; for a linen module.
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise UserError(
            f"Expected a flax.nnx module, got {type(model).__name__}; `from_linen` takes linen "
            "modules with their variables, `from_fn` any function."
        )
    copy = nnx.clone(model)
    copy.eval()
    graph, generators, state = nnx.split(copy, nnx.RngState, ...)
    apply_fn = NnxFn(graph if _is_hashable(graph) else _Itself(graph), _Frozen(generators))
    state = nnx.to_pure_dict(state)
    return from_fn(apply_fn, state, **{"name": type(model).__name__, **settings})


@dataclasses.dataclass(frozen=True)
class LinenFn:
    """(variables, images) -> what a method of a linen module gives; equal for equal modules."""

    module: nn.Module | _Itself
    method: str = "__call__"
    keywords: tuple[tuple[str, Hashable], ...] = ()

    def __call__(self, variables: PyTree, images: Array) -> Array:
        module = self.module.value if isinstance(self.module, _Itself) else self.module
        keywords: dict[str, Any] = dict(self.keywords)
        result: Any = module.apply(variables, images, method=self.method, **keywords)
        return result


@dataclasses.dataclass(frozen=True)
class NnxFn:
    """(state, images) -> what an nnx module gives; equal for equal modules."""

    graph: nnx.GraphDef | _Itself
    generators: _Frozen

    def __call__(self, state: PyTree, images: Array) -> Array:
        from flax import nnx

        graph = self.graph.value if isinstance(self.graph, _Itself) else self.graph
        model = nnx.merge(graph, self.generators.value, state)
        return model(images)


@dataclasses.dataclass(frozen=True)
class _Frozen:
    """What inference does not read, and does not tell two functions apart."""

    value: Any = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, eq=False)
class _Itself:
    """What has no hash, hence is equal to itself only."""

    value: Any


def _is_hashable(value: Any) -> bool:
    """Whether `jit` can tell it from others by its content."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
