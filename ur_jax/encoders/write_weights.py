"""Writes an encoder back as a PyTorch state dict, so that it can be used where it came from.

    ur-jax export-weights --encoder runs/mine/encoder --out mine.safetensors
    ur-jax export-weights --encoder runs/moco/encoder --like moco_v2_200ep_pretrain.pth.tar \\
        --out moco_robust.safetensors

A network of PyTorch that was trained here (`--init` torch:file.py:make, timm:NAME, hf:DIRECTORY, or
a checkpoint that `convert-weights --trainable` made) is written with all keys of its own state
dict, those that training leaves alone as they were; tensors that the module shares are equal. A
published encoder is written as the file that --like names, with the encoder's tensors in the place
of that file's.

    module.load_state_dict(safetensors.torch.load_file("mine.safetensors"))

A name that ends in .pt or .pth is written by torch.save, which needs PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console

from ur_jax import runs
from ur_jax.encoders import loading, mapping, torch_files
from ur_jax.encoders.bridge import GraphFn, state_dict
from ur_jax.errors import UserError, require

_SUFFIXES = (".safetensors", ".pt", ".pth")
_WRAPPED = {"hf": "model."}
"""What the keys of a scheme's networks begin with, since the bridge wraps them."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes an encoder back as a PyTorch state dict."""

    encoder: str | None = None
    """The checkpoint directory of an encoder that was trained, or whatever loads as one."""
    out: Path | None = None
    """The file to write: .safetensors, .pt or .pth."""
    like: Path | None = None
    """Of a published encoder: a file of its layout, such as the one that training began with."""
    name: str | None = None
    """Which encoder a published file as --encoder holds."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a file that is there already."""

    def __post_init__(self):
        for field in ("encoder", "out"):
            if getattr(self, field) is None:
                raise UserError(f"Expected --{field}, got none.")
        assert self.out is not None
        if self.out.suffix not in _SUFFIXES:
            raise UserError(f"Expected --out with {' or '.join(_SUFFIXES)}, got {self.out}.")
        if self.out.exists() and not self.overwrite:
            raise UserError(f"Expected a new file, but {self.out} exists; name another one.")


def main(config: Config) -> None:
    """Writes the file, and says how it is loaded."""
    assert config.encoder is not None and config.out is not None  # `Config` has seen to it
    tensors = exported(config.encoder, config.like, config.name)
    write(config.out, tensors)
    total = sum(array.size for array in tensors.values())
    loader = f'safetensors.torch.load_file("{config.out.name}")'
    if config.out.suffix != ".safetensors":
        loader = f'torch.load("{config.out.name}")'
    lines = [
        f"Wrote {config.out}: {len(tensors)} tensors, {total:,} numbers.",
        f"SHA-256: {torch_files.file_sha256(config.out)}",
        f"In PyTorch: module.load_state_dict({loader})",
    ]
    Console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def exported(
    place: str, like: Path | None = None, name: str | None = None
) -> dict[str, np.ndarray]:
    """The state dict of an encoder.

    Args:
      place: what `load_encoder` takes.
      like: a file of a published encoder's layout.
      name: which encoder a published file holds.

    Raises:
      UserError: for an encoder that has no keys of PyTorch, or a file of another layout.
    """
    if loading.is_own(place):
        if like is not None:
            raise UserError(f"Expected no --like with {place}, which knows its own keys.")
        encoder = loading.load_encoder(place, fold=False)
        if not isinstance(encoder.apply_fn, GraphFn):
            raise UserError(
                f"Expected a network of PyTorch or a published encoder, got {place}, a function of "
                "your own in JAX, which has no keys of PyTorch."
            )
        scheme = (encoder.origin.place or "").partition(":")[0]
        prefix = _WRAPPED.get(scheme, "")
        return {key.removeprefix(prefix): x for key, x in state_dict(encoder).items()}
    loaded = loading.load_variables(place, name)
    if not loaded.spec.rules:
        raise UserError(
            f"Encoder {loaded.spec.name!r} was made here: it has no published layout to write."
        )
    if like is None:
        raise UserError(
            f"Expected --like with the published encoder {loaded.spec.name!r}: the file that it is "
            "from, whose other tensors and shapes are kept."
        )
    read = torch_files.read_tensors(like, loaded.spec.groups)
    variables = jax.tree.map(np.asarray, loaded.variables)
    return mapping.unmapped(variables, loaded.spec, read.tensors, like.name)


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as .safetensors, or by torch.save."""
    whole = {key: np.array(array, order="C") for key, array in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with runs.atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(whole, temporary)
        else:
            torch = require("torch", "torch", f"Writing {path.name}")
            torch.save({key: torch.from_numpy(array) for key, array in whole.items()}, temporary)
