"""What every script here shares: flags from a dataclass, presets, clear errors, progress bars."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

import fsspec
import jax
import tyro
from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ur_jax import hosts
from ur_jax.errors import unknown_name

Config = TypeVar("Config")
console = Console()
_registry = tyro.constructors.ConstructorRegistry()


def run(
    main: Callable[[Config], Any], config: type[Config], presets: Mapping[str, Any] | None = None
) -> Any:
    """Parses the command line into `config` and calls `main`; a bad value ends in one clear line.

    Args:
      main: the script.
      config: frozen dataclass of its flags; with presets, its field `preset` names one of them.
      presets: {name: defaults}, dataclass instances.

    Returns:
      What `main` returns.
    """
    hosts.join()  # before any other use of JAX
    list_buckets_anew()
    # One CPU device per core: XLA's convolution gradients otherwise keep to one core.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    keep_compilations()
    try:
        return main(parse(config, presets, sys.argv[1:]))
    except (ValueError, FileNotFoundError, ImportError) as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(2)


def keep_compilations() -> None:
    """Keeps compiled programs from one run to the next, in a folder of the user's cache.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "ur_jax"))


def list_buckets_anew() -> None:
    """Keeps no listing of a bucket in memory: other hosts write there too."""
    for protocol in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False


def parse(config: type[Config], presets: Mapping[str, Any] | None, args: list[str]) -> Config:
    """Returns the configuration of a command line, on top of its preset.

    A path may be of a bucket: what a flag gives for a `Path` is an `etils.epath.Path`.
    """
    if presets is None:
        return tyro.cli(config, args=args, registry=_registry)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=next(iter(presets)))
    preset = parser.parse_known_args(args)[0].preset
    if preset not in presets:
        raise unknown_name("preset", preset, presets)
    return tyro.cli(config, args=args, default=presets[preset], registry=_registry)


@contextlib.contextmanager
def counter(description: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Gives update(completed, text) of a progress bar; a line a minute where nobody watches."""
    shown = time.monotonic()
    with Progress(
        *_columns(),
        TextColumn("{task.fields[text]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=total, text="")

        def update(completed: int, text: str) -> None:
            nonlocal shown
            bar.update(task, completed=completed, text=text)
            if not console.is_terminal and time.monotonic() - shown > 60:
                shown = time.monotonic()
                console.print(f"{description}: {completed}/{total}, {text}", highlight=False)

        yield update


def progress(iterable: Iterable[Any], description: str, total: int) -> Iterator[Any]:
    """Passes items on under a progress bar with the time left; quiet where nobody watches."""
    with Progress(*_columns(), console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(iterable, description=description, total=total)
    if not console.is_terminal:
        console.print(f"{description}: {total} batches done", highlight=False)


@_registry.primitive_rule
def _path_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Reads a `Path` that may be gs://..., of which `pathlib` would drop a slash."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: epath.Path(texts[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda value: [os.fspath(value)],
    )


def _columns() -> tuple[ProgressColumn, ...]:
    """Of a progress bar."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
