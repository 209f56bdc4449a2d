"""Converts a published PyTorch file, or any network of PyTorch, to a checkpoint without PyTorch.

    ur-jax convert-weights --list
    ur-jax convert-weights --encoder mocov2 --source FILE --out DIRECTORY
    ur-jax convert-weights --encoder hf:facebook/dinov2-small --out DIRECTORY
    ur-jax convert-weights --encoder timm:resnet50@weights.safetensors --out DIRECTORY
    ur-jax convert-weights --encoder torch:file.py:make --input-size 224 --out DIRECTORY
    ur-jax convert-weights --encoder hf:facebook/dinov2-small --trainable --out DIRECTORY

Every tensor of the file is either used or known by name to be unused; otherwise nothing is written
and one error lists what is missing, unexpected or of another shape. The six adversarially
fine-tuned files convert as `mocov2` and `mocov3`, whose layouts they have.

For a file of your own: `--prefix backbone.` if the encoder's keys start with that, `--group
state_dict_ema` if it holds several sets of weights, `--representation backbone` if it has no head,
or another one.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from ur_jax.encoders import checkpoints, mapping, torch_files
from ur_jax.encoders.bridge import places
from ur_jax.encoders.loading import representation_dimensions, save_encoder
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import UserError, unknown_name


@dataclasses.dataclass(frozen=True)
class Config:
    """Converts a PyTorch file, or any network of PyTorch, to a checkpoint without PyTorch."""

    encoder: str | None = None
    """The encoder that the file holds, see --list; or a network of PyTorch: torch:file.py:make,
    timm:NAME[@WEIGHTS], hf:DIRECTORY or hf:ID[@REVISION]."""
    source: Path | None = None
    """The published file: .pth, .pth.tar, .pt (these need PyTorch) or .safetensors."""
    out: Path | None = None
    """The checkpoint directory to make."""
    prefix: str | None = None
    """What the encoder's keys start with, such as backbone., where not as published."""
    group: str | None = None
    """The entry of the file with the weights, such as state_dict_ema, where it has several."""
    representation: Literal["all", "backbone"] = "all"
    """backbone: convert no head, of a file that has none or one of another size."""
    output: str | None = None
    """Which output of a network of PyTorch: backbone (without a projection), or a name, with .cls,
    .mean, .flat or .normalized after it. By default what the family's users take."""
    input_size: str | None = None
    """Pixels of a network of PyTorch, 224 or 224x336, where not its own."""
    trust_remote_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run code that a model of the hub brings along."""
    trainable: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep the tensors of a network of PyTorch as they are, for training to go on from and
    export-weights to write back; slower, as BatchNorm is not folded."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a checkpoint that is at --out already."""
    list: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print what is known about every encoder, and stop."""

    def __post_init__(self):
        if self.list:
            return
        is_network = places.is_place(self.encoder or "")
        needed = ("encoder", "out") if is_network else ("encoder", "source", "out")
        if missing := [k for k in needed if getattr(self, k) is None]:
            raise UserError(f"Expected --list, or also --{', --'.join(missing)}.")
        wrong = ("source", "prefix", "group") if is_network else ("output", "input_size")
        if given := [k for k in wrong if getattr(self, k) is not None]:
            what = "a network of PyTorch" if is_network else f"the file of {self.encoder}"
            raise UserError(f"Expected no --{given[0].replace('_', '-')} with {what}.")
        if is_network:
            return
        if self.trainable:
            raise UserError("Expected no --trainable with a published file, which always is.")
        valid = [name for name, spec in ENCODERS.items() if spec.rules]
        if self.encoder not in valid:
            raise unknown_name("encoder", f"{self.encoder}", valid)


def main(config: Config) -> None:
    """Converts one file, or prints the table."""
    if config.list:
        Console().print(encoder_table())
        return
    if places.is_place(config.encoder or ""):
        _convert_network(config)
        return
    assert config.encoder and config.source and config.out  # `Config` has seen to it
    spec = ENCODERS[config.encoder]
    if config.representation == "backbone":
        spec = spec.without_head()
    published = mapping.load_published(
        config.source, spec, prefix=config.prefix, group=config.group
    )
    metadata = {
        "encoder": spec.name,
        "config": published.config,
        "head": config.representation == "all",
        "source": config.source.name,
        "source_sha256": torch_files.file_sha256(config.source),
    }
    training = {"training": published.parts} if published.parts else {}
    checkpoints.save_encoder(
        config.out, published.variables | training, metadata, overwrite=config.overwrite
    )
    lines = [f"Wrote {config.out}: {spec.name} from {config.source.name}"]
    lines.append(f"SHA-256 of the source: {metadata['source_sha256']}")
    if published.parts:
        lines.append(f"With what training goes on from: {', '.join(published.parts)}")
    if published.left_out:
        lines.append(f"Left out: {len(published.left_out)} tensors outside {config.prefix!r}")
    if published.skipped:
        lines.append(f"Skipped, as they are no tensors: {', '.join(published.skipped)}")
    representation = "" if metadata["head"] else " --representation backbone"
    place = shlex.quote(str(config.out))
    flags = f"--preset quick --encoder {place}{representation} --images demo --out DIR"
    lines.append(f"Next: ur-jax evaluate {flags}")
    Console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _convert_network(config: Config) -> None:
    """Converts a network of PyTorch."""
    assert config.encoder and config.out
    text = config.encoder
    if config.input_size is not None:
        text += f",input_size={config.input_size}"
    if config.trust_remote_code:
        text += ",trust_remote_code=True"
    checkpoints.check_new(config.out, overwrite=config.overwrite)
    encoder = places.load(text, config.output or "paper", fold=not config.trainable)
    save_encoder(config.out, encoder, overwrite=config.overwrite)
    lines = [f"Wrote {config.out}: {encoder!r}"]
    arguments = encoder.origin.arguments
    if revision := arguments.get("revision"):
        lines.append(f"Revision: {revision}")
    hashes = arguments.get("sha256") or {}
    for name, digest in {"weights": hashes}.items() if isinstance(hashes, str) else hashes.items():
        lines.append(f"SHA-256 of {name}: {digest}")
    place = shlex.quote(str(config.out))
    lines.append(f"Next: ur-jax evaluate --preset quick --encoder {place} --images demo --out DIR")
    Console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def encoder_table() -> Table:
    """Returns what is known about every encoder."""
    table = Table(title="Encoders", show_lines=True)
    table.add_column("name, network, paper", ratio=3)
    table.add_column("published at, file, licence", overflow="fold", ratio=4)
    table.add_column("input", no_wrap=True)
    table.add_column("representations", no_wrap=True)
    for spec in ENCODERS.values():
        height, width = spec.input_size
        outputs = representation_dimensions(spec)
        table.add_row(
            f"[bold]{spec.name}[/bold]\n{spec.title}\n{spec.reference}",
            f"{spec.url}\n{spec.file_name or '-'}\nlicence: {spec.licence}",
            f"{height}x{width}",
            "\n".join(
                f"{name} {dimension}{' (paper)' if name == spec.paper else ''}"
                for name, dimension in outputs.items()
            ),
        )
    return table
