"""`from_torch`: an encoder of any PyTorch module."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ur_jax.encoders.base import Encoder, from_fn
from ur_jax.encoders.bridge import passes
from ur_jax.encoders.bridge.export import as_array, export
from ur_jax.encoders.bridge.function import GraphFn, collected, flat
from ur_jax.encoders.bridge.graph import STATE_DTYPES, Graph, Key, Tensors, dumps, loads
from ur_jax.errors import UserError, require, unknown_name

POOLINGS = ("cls", "mean", "flat", "normalized")
_SAME = 1e-3


def from_torch(
    module: Any,
    *,
    input_size: tuple[int, int],
    preparation: str = "resize",
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    output: str | None = None,
    name: str | None = None,
    dtype: str = "float32",
    check: bool = True,
    fold: bool = True,
) -> Encoder:
    """Makes an encoder of any PyTorch module, in inference mode, as a pure function of JAX.

    The module is exported with `torch.export` and needed no more afterwards: the encoder is a graph
    of known operations, jitted, differentiated and sharded as any other, and `save_encoder` keeps
    graph and weights in a checkpoint that loads without PyTorch.

    Args:
      module: a `torch.nn.Module` that maps normalised images (B,3,H,W) float32 to (B,D), or to
        several results of which `output` names one. It is left as it is.
      input_size: height and width of the images.
      preparation: how an image file becomes an input, see `Encoder`.
      mean: per-channel mean to subtract from the [0,1] pixels; (0, 0, 0) if the module does it.
      std: per-channel standard deviation to divide by.
      output: which result to take of a module that gives several, by key, attribute or number, and
        how to make it (B,D), with dots: "last_hidden_state.cls" is the first token, ".mean" the
        mean over tokens or places, ".flat" all of them in a row, ".normalized" of length 1. Of a
        module that gives one result the name is "output".
      name: name in tables and records; the class's by default.
      dtype: compute dtype: products in bfloat16 leave normalisations, softmax and what the module
        itself casts to float32 in float32.
      check: compare it with PyTorch on three images of noise.
      fold: make it fast: BatchNorm becomes part of the convolution before it, and what depends on
        parameters alone is computed once. Without, for training: `params` are {"params",
        "buffers"}, the module's own tensors, which `state_dict` gives back under its own keys.

    Returns:
      The encoder; its parameters have PyTorch's names, and tensors that the module shares are one.

    Raises:
      UserError: for operations without a row in the table, all in one error with their places;
        control flow that depends on data; several results without `output`; weights that are not
        finite; a result that is not PyTorch's.
      MissingPackageError: without PyTorch.
    """
    torch = require("torch", "torch", "from_torch")
    if not isinstance(module, torch.nn.Module):
        raise UserError(
            f"Expected a torch.nn.Module, got {type(module).__name__}; wrap a function in a module."
        )
    name = name or type(module).__name__
    size = (int(input_size[0]), int(input_size[1]))
    with inference_mode(module, name) as module:
        picked = _picked(torch, module, size, output, name)
        exported = export(picked, size, name, fold=fold)
        if fold:
            graph, tensors = passes.optimised(exported.graph, exported.tensors)
        else:
            graph, tensors = passes.trainable(exported.graph, exported.tensors)
            graph, tensors = _with_state(module, graph, tensors)
        settings: dict[str, Any] = {
            "input_size": size,
            "name": name,
            "preparation": preparation,
            "mean": mean,
            "std": std,
            "representation": picked.label,
        }
        arrays = {key: jnp.asarray(value) for key, value in tensors.items()}
        params = collected(graph, arrays)
        function = GraphFn(dumps(graph, tensors))
        encoder = from_fn(function, params, **settings)
        if check:
            _check_same(torch, picked, encoder)
    return encoder if dtype == "float32" else from_fn(function, params, dtype=dtype, **settings)


def state_dict(encoder: Encoder) -> dict[str, np.ndarray]:
    """The state dict of a bridged encoder's module, with the encoder's tensors in it.

    Args:
      encoder: one that was made with `fold=False`, such as one that was trained.

    Returns:
      {key of the module's state dict: array}, all of them; floating point is float32.

    Raises:
      UserError: for an encoder whose tensors are no longer the module's.
    """
    graph = loads(encoder.apply_fn.text)[0] if isinstance(encoder.apply_fn, GraphFn) else None
    if graph is None or not graph.keys:
        raise UserError(
            f"The tensors of encoder {encoder.name!r} are not those of a PyTorch module: BatchNorm "
            "is folded, or constants are computed. Train from the module itself (--init "
            "torch:file.py:make, timm:NAME or hf:DIRECTORY), or convert it with --trainable."
        )
    tensors = flat(encoder.params)
    return {key.key: np.asarray(tensors[key.tensor]).astype(key.dtype) for key in graph.keys}


def _with_state(module: Any, graph: Graph, tensors: Tensors) -> tuple[Graph, Tensors]:
    """A graph with the keys of the module's state dict, whose unused tensors are kept too."""
    tensors, keys = dict(tensors), []
    parameters = dict(module.named_parameters(remove_duplicate=False))
    trained = {key for key, value in parameters.items() if value.requires_grad} or set(parameters)
    place = lambda t: (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
    state = {key: value for key, value in module.state_dict().items() if hasattr(value, "data_ptr")}
    used = {place(value): key for key, value in state.items() if key in tensors}
    for key, value in state.items():
        name = key if key in tensors or not value.numel() else used.get(place(value), key)
        if name not in tensors:
            tensors[name] = as_array(value, is_parameter=True)
            used[place(value)] = name
        dtype = "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        if dtype not in STATE_DTYPES:
            raise UserError(f"The tensor {key} of the module is {dtype}, which cannot be kept.")
        keys.append(Key(key, name, dtype, key in trained))
    return graph.replace(keys=tuple(keys)), tensors


def _acts_in_training(layer: Any) -> bool:
    """Whether a layer does something else in training: Dropout, stochastic depth, BatchNorm."""
    shares = (getattr(layer, name, None) for name in ("p", "drop_prob", "dropout"))
    chance = any(isinstance(share, float) and share > 0 for share in shares)
    return chance or getattr(layer, "running_mean", None) is not None


@contextlib.contextmanager
def inference_mode(module: Any, name: str) -> Iterator[Any]:
    """The module in inference mode and float32; afterwards it is as it was."""
    training = [m for m in module.modules() if m.training]
    if any(_acts_in_training(m) for m in training):
        warnings.warn(
            f"The network {name!r} was in training mode; its encoder is in inference mode: Dropout "
            "is off, BatchNorm uses its running statistics.",
            stacklevel=3,
        )
    tensors = [*module.parameters(), *module.buffers()]
    used = module
    if any(t.is_floating_point() and str(t.dtype) != "torch.float32" or t.is_cuda for t in tensors):
        import copy

        used = copy.deepcopy(module).cpu().float()
    used.eval()
    try:
        yield used
    finally:
        for part in training:
            part.training = True


def _picked(torch: Any, module: Any, size: tuple[int, int], output: str | None, name: str) -> Any:
    """The module with its one result (B,D), after a look at what it gives."""
    with torch.no_grad():
        result = _called(module, torch.zeros(2, 3, *size), name)
    entries = dict(_entries(torch, result))
    if not entries:
        raise UserError(f"The network {name!r} gives no tensor but {type(result).__name__}.")
    shown = ", ".join(f"{key} {list(t.shape)}" for key, t in entries.items())
    wanted, *poolings = (output or "").split(".")
    if unknown := [p for p in poolings if p not in POOLINGS]:
        raise unknown_name("way to make one row of an output", unknown[0], POOLINGS)
    if not wanted and len(entries) > 1:
        raise UserError(
            f"The network {name!r} gives several results for 2 images, {shown}: name the one to "
            f"take, output={next(iter(entries))!r} (--output)."
        )
    wanted = wanted or next(iter(entries))
    if wanted not in entries:
        raise UserError(f"The network {name!r} has no output {wanted!r}; it gives {shown}.")
    tensor = entries[wanted]
    rank = 2 if set(poolings) & {"cls", "mean", "flat"} else tensor.dim()
    if rank != 2 or tensor.shape[0] != 2:
        ways = {3: ("cls", "mean"), 4: ("mean", "flat")}.get(tensor.dim(), ("flat",))
        raise UserError(
            f"Expected {name!r} to give one row (B,D) for each image, but {wanted} of 2 images is "
            f"{list(tensor.shape)}; choose by output={wanted + '.' + ways[0]!r} or "
            f"{wanted + '.' + ways[-1]!r}."
        )
    return _Picked(torch, module, wanted, tuple(poolings))


def _called(module: Any, images: Any, name: str) -> Any:
    """What the module gives for images."""
    try:
        return module(images)
    except Exception as error:
        text = " ".join(str(error).split())
        if channels := re.search(r"to have (\d+) channels, but got 3 channels", text):
            raise UserError(
                f"The network {name!r} takes images of {channels[1]} channel(s), not 3 (B,3,H,W): "
                "wrap it in a module that makes its input of RGB images first, by their mean say."
            ) from error
        if channels := re.search(r"to have (\d+) channels, but got (\d+) channels", text):
            raise UserError(
                f"The network {name!r} does not take images (B,3,H,W), but {channels[1]} channels "
                f"where these have {channels[2]}; if it wants (B,H,W,3), wrap it in a module that "
                "permutes them."
            ) from error
        raise UserError(
            f"The network {name!r} does not take images {list(images.shape)}: "
            f"{type(error).__name__}: {text[:300]}; look at input_size, or wrap it in a module."
        ) from error


def _entries(torch: Any, result: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of what a module gives."""
    if isinstance(result, torch.Tensor):
        yield "output", result
        return
    if isinstance(result, Mapping):
        items = result.items()
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        items = zip(getattr(result, "_fields"), result, strict=True)  # noqa: B009
    elif isinstance(result, (list, tuple)):
        items = enumerate(result)
    elif dataclasses.is_dataclass(result) or hasattr(result, "__dict__"):
        items = vars(result).items()
    else:
        return
    for key, value in items:
        if isinstance(value, torch.Tensor):
            yield str(key), value


def _Picked(torch: Any, module: Any, wanted: str, poolings: tuple[str, ...]) -> Any:
    """A module whose result is one entry of another's, pooled."""

    class Picked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module
            self.label = ".".join((wanted, *poolings))

        def forward(self, images):
            x = dict(_entries(torch, self.module(images)))[wanted]
            for pooling in poolings:
                if pooling == "cls":
                    x = x[:, 0]
                elif pooling == "mean":
                    x = x.mean(dim=1) if x.dim() == 3 else x.mean(dim=tuple(range(2, x.dim())))
                elif pooling == "flat":
                    x = x.flatten(1)
                else:
                    x = torch.nn.functional.normalize(x, dim=-1)
            return x

    return Picked().eval()


def _check_same(torch: Any, module: Any, encoder: Encoder) -> None:
    """Raises UserError unless encoder and module agree on images of noise."""
    size = (3, *encoder.input_size, 3)
    images = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    got = np.asarray(jax.jit(encoder.apply_fn)(encoder.params, images))
    error = float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    if not error <= _SAME:
        raise UserError(
            f"The representations of the network {encoder.name!r} differ from PyTorch's by "
            f"{error:.2g} of the largest value; is chance at work in it, or its scale not finite?"
        )
