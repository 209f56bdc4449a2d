"""Converts a published PyTorch file into a checkpoint that needs no PyTorch.

    ur-jax convert-weights --list
    ur-jax convert-weights --encoder mocov2 --source FILE --out DIRECTORY

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
from ur_jax.encoders.loading import representation_dimensions
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import UserError, unknown_name


@dataclasses.dataclass(frozen=True)
class Config:
    """Converts a published PyTorch file into a checkpoint that needs no PyTorch."""

    encoder: str | None = None
    """The encoder that the file holds; see --list."""
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
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a checkpoint that is at --out already."""
    list: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print what is known about every encoder, and stop."""

    def __post_init__(self):
        if self.list:
            return
        if missing := [k for k in ("encoder", "source", "out") if getattr(self, k) is None]:
            raise UserError(f"Expected --list, or also --{', --'.join(missing)}.")
        valid = [name for name, spec in ENCODERS.items() if spec.rules]
        if self.encoder not in valid:
            raise unknown_name("encoder", f"{self.encoder}", valid)


def main(config: Config) -> None:
    """Converts one file, or prints the table."""
    if config.list:
        Console().print(encoder_table())
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
