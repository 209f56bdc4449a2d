"""How fast it is on this machine's devices, beside their peaks and, with --against torch, PyTorch.

    ur-jax throughput --against torch --out runs/throughput
    ur-jax throughput --history                # what was recorded, over time

Writes to --out: `throughput.json` and `throughput.png`. Where only the core is installed (no tyro,
no matplotlib), `python -m ur_jax.performance` measures the same; --results shows what it wrote.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ur_jax import performance, runs
from ur_jax.encoders import loading
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import NotFoundError, UserError
from ur_jax.performance import history, suite


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure. A tuple or number that is given replaces that of the preset's first sweep,
    which is then the only one."""

    out: Path = Path("runs/throughput")
    """Folder of the results."""
    preset: str = "cpu"
    """cpu, gpu (one command of 8 minutes), scaling, or toy (does everything run?)."""
    against: Literal["nothing", "torch"] = "nothing"
    """torch: the same work in PyTorch, by turns."""
    works: tuple[str, ...] = ()
    """u_pgd, forward, noisy, center, distances, training, certificates, adaptive."""
    encoders: tuple[str, ...] = ()
    """Names of encoders; random weights where none ship."""
    dtypes: tuple[str, ...] = ()
    """float32, bfloat16."""
    batch_sizes: tuple[int, ...] = ()
    """Images over all devices."""
    repeats: int | None = None
    """Timed runs of each implementation."""
    budget: float = float("inf")
    """Seconds after which no further case begins."""
    compile_threads: int = 1
    """More than one: programs are compiled before the first case, so many at once; for GPUs."""
    results: Path | None = None
    """A throughput.json measured elsewhere: shows it and draws its plot, and measures nothing."""
    record: str | None = None
    """Adds a line to the history in the tree, with what else the machine was doing in these words:
    "nothing else running"."""
    history: bool = False
    """Print the history and stop."""


PRESETS = {name: Config(preset=name) for name in performance.PRESETS}


def main(config: Config) -> None:
    if config.against == "torch":  # which needs some of the device's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not config.budget > 0:
        raise UserError(f"Expected a budget > 0 s, got {config.budget}.")
    suite.check_threads(config.compile_threads)
    for encoder in config.encoders:
        if encoder not in ENCODERS:  # one of one's own, before the others are measured
            loading.load_encoder(encoder)
    if config.history:
        show_history()
        return
    if config.record is not None:
        history.check_record(config.record)
    if config.results is not None:
        measured = read(config.results)
        show(config, *measured)
        record(config, *measured)
        return

    def write(results, context):
        path = config.out / "throughput.json"
        runs.write_json(path, {**context, "results": results})
        Console().print(f"{results[-1].work}: {len(results)} measurements so far")

    measured = performance.run(
        sweeps(config), against=config.against, budget=config.budget,
        compile_threads=config.compile_threads, on_results=write,
    )  # fmt: skip
    show(config, *measured)
    record(config, *measured)


def read(path: Path) -> tuple[list[performance.Result], dict]:
    """The results of a throughput.json and what they were measured on.

    Raises:
      UserError: for another file; it names the file.
    """
    if not path.is_file():
        raise NotFoundError(f"There is no file {path}; name the throughput.json of another run.")
    context = runs.read_json(path)
    try:
        return [performance.Result(**result) for result in context.pop("results")], context
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"Expected a throughput.json, got {path} ({error!r}).") from error


def sweeps(config: Config) -> list[performance.Sweep]:
    """The preset's sweeps, or its first one changed by the flags that were given."""
    preset = performance.PRESETS[config.preset]
    names = ("works", "encoders", "dtypes", "batch_sizes", "repeats")
    given = {name: value for name in names if (value := getattr(config, name))}
    return [dataclasses.replace(preset[0], **given)] if given else list(preset)


def record(config: Config, results: list[performance.Result], context: dict) -> None:
    """Adds the measurement to the history, if that is asked for."""
    if config.record is not None:
        history.append(history.line(results, context, config.record))
        Console().print(f"Recorded in {history.PATH}", highlight=False, soft_wrap=True)


def show_history() -> None:
    """Prints the history."""
    table = Table(title="throughput over time", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in history.COLUMNS:
        table.add_column(column)
    for line in history.read():
        for row in history.rows(line):
            table.add_row(*map(escape, row))
    Console().print(table)


def show(config: Config, results: list[performance.Result], context: dict) -> None:
    """Prints the table and draws the plot."""
    from ur_jax.report import plots, terminal  # the first needs matplotlib

    versions = ", ".join(f"{name} {version}" for name, version in context["versions"].items())
    title = f"{context['num_devices']} x {context['device']}, {context['date']}, {versions}"
    Console().print(terminal.throughput_table(title, results))
    for case in context["left_out"]:
        Console().print(f"left out: {case}", markup=False)
    plots.plot_throughput(config.out / "throughput.png", results)
    Console().print(f"Wrote {config.out}/throughput.png", highlight=False)
