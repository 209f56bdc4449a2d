"""The command line: `ur-jax COMMAND ...`, and what every script here shares.

    ur-jax evaluate --encoder demo --images demo --preset quick --out runs/demo
    python experiments/evaluate.py ...         # the same, from a checkout

A command is a job of `jobs.JOBS`, whose fields are its flags, or one of the modules of `_SCRIPTS`,
with `main(config)`, a dataclass `Config` of its flags and, if it has any, `PRESETS`.
"""

from __future__ import annotations

from ur_jax import _begin  # noqa: F401  first: what follows takes seconds

# isort: split
import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, NamedTuple, TypeVar

import jax
import tyro
from etils import epath
from fsspec import config as fsspec_config

import ur_jax
from ur_jax import data, endings, registry, runs
from ur_jax.devices import hosts, launchers
from ur_jax.devices.launchers import Launch
from ur_jax.errors import UserError, unknown_name
from ur_jax.jobs import JOBS, Job, chosen
from ur_jax.jobs.base import EncoderLike, ImagesLike, ProbeLike
from ur_jax.jobs.progress import console

Config = TypeVar("Config")
_registry = tyro.constructors.ConstructorRegistry()
_registry.struct_rule(chosen.rule)

_SCRIPTS = {
    "benchmark": "ur_jax.jobs.benchmark",
    "report": "ur_jax.report.build",
    "card": "ur_jax.report.card",
    "leaderboard": "ur_jax.report.leaderboard",
    "attack-table": "ur_jax.jobs.attack_table",
    "compare-certificates": "ur_jax.jobs.compare_certificates",
    "compare-training": "ur_jax.jobs.compare_training",
    "convert-weights": "ur_jax.encoders.convert",
    "export-weights": "ur_jax.encoders.write_weights",
    "throughput": "ur_jax.performance.command",
    "verify": "ur_jax.runs.verify",
    "repair": "ur_jax.runs.repair",
    "reproduce-cifar": "ur_jax.jobs.reproduce_cifar",
}
"""Commands that are no jobs, and their modules."""

_WITHOUT_DEVICES = ("report", "card", "leaderboard", "verify", "repair")
"""Commands that only read and write files, so that they may run while a benchmark does."""

_GLOBAL_FLAGS = {
    "--plugin FILE.py": "imports what registers encoders, metrics, jobs, ... of one's own",
    "--coordinator HOST:PORT": "several processes without a launcher: where process 0 is,",
    "--num-processes N --process-id I": "how many there are and which one this is, from 0",
}


_SAVES_FIRST = ("train",)
"""Commands that leave SIGTERM to JAX where there are several hosts: it has all of them stop at the
same step, whose state is saved."""


class Command(NamedTuple):
    """What a name on the command line stands for.

    Attributes:
      main: takes the flags; what it returns, if anything, is the exit status.
      flags: frozen dataclass; with presets, its field `preset` names one of them.
      presets: {name: defaults}, instances of `flags`; the first is the default.
      description: its help.
    """

    main: Callable[[Any], Any]
    flags: type
    presets: Mapping[str, Any] | None
    description: str


def main(argv: Sequence[str] | None = None) -> int:
    """The console command; returns the exit status, see `endings`."""
    given = list(sys.argv[1:] if argv is None else argv)
    with endings.Ending() as ending:
        given, launch = take_global_flags(given)
        name, *words = given or ["--help"]
        if name in ("-h", "--help", "--version"):
            text = ur_jax.__version__ if name == "--version" else usage()
            console.print(text, highlight=False, markup=False)
            return 0
        return _run(name, words, launch, ending)
    return ending.status


def names() -> tuple[str, ...]:
    """Every command."""
    return tuple(sorted((*JOBS, *_SCRIPTS)))


def usage() -> str:
    """The commands, a line each."""
    lines = ["usage: ur-jax COMMAND [flags]; COMMAND --help tells its flags", ""]
    for name in names():
        lines.append(f"  {name:<18}{find(name).description.strip().splitlines()[0]}")
    lines += ["", "flags of every command:"]
    lines += [f"  {flag:<34}{text}" for flag, text in _GLOBAL_FLAGS.items()]
    return "\n".join([*lines, "", endings.STATUSES])


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs a command; what ends it is told in one line, but a fault of ours keeps its traceback.

    Args:
      name: of the command.
      argv: its flags; by default those of this process.

    Returns:
      The exit status, see `endings`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with endings.Ending() as ending:
        words, launch = take_global_flags(words)
        return _run(name, words, launch, ending)
    return ending.status


def _run(name: str, words: Sequence[str], launch: Launch | None, ending: endings.Ending) -> int:
    """Runs a command on whichever hosts there are."""
    ending.name = name
    if name in _WITHOUT_DEVICES:
        jax.config.update("jax_platforms", "cpu")  # no accelerator, nor a pod's other hosts
    hosts.join(launch)  # before any other use of JAX
    if name not in _SAVES_FIRST:
        ending.obey_signals()
    list_buckets_anew()
    for library in ("absl", "asyncio"):  # what they tell is raised too, and then told in one line
        logging.getLogger(library).setLevel(logging.CRITICAL)
    with contextlib.suppress(RuntimeError):  # JAX is in use already: a notebook, a test
        # One CPU device per core: XLA's convolution gradients otherwise keep to one core.
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    keep_compilations()
    command = find(name)
    console.quiet = not hosts.is_first()
    ending.flags = parse(command, words, prog=f"ur-jax {name}")
    data.check_workers(getattr(ending.flags, "num_workers", 0))
    for place in ("out", "clean", "image_cache"):
        check_place(f"--{place.replace('_', '-')}", getattr(ending.flags, place, None))
    return int(command.main(ending.flags) or 0)


def find(name: str) -> Command:
    """The command of a name.

    Raises:
      UserError: for an unknown name.
    """
    if name in _SCRIPTS:
        module = importlib.import_module(_SCRIPTS[name])
        presets = getattr(module, "PRESETS", None)
        return Command(module.main, module.Config, presets, module.__doc__ or "")
    if name not in JOBS:
        raise unknown_name("command", name, (*JOBS, *_SCRIPTS))
    return job_command(JOBS[name])


def job_command(job: type[Job]) -> Command:
    """The command of a job: its fields are the flags, beside where to and how."""
    job, out = job.command(), None if job.out_is_optional else tyro.MISSING
    preset = [("preset", str, dataclasses.field(default=name)) for name in [*job.presets][:1]]
    flags = dataclasses.make_dataclass(
        f"{job.__name__}Flags",
        [
            ("job", Annotated[job, tyro.conf.arg(name="")], dataclasses.field(default_factory=job)),
            ("out", Path | None if job.out_is_optional else Path, dataclasses.field(default=out)),
            *preset,
            ("clean", Path | None, dataclasses.field(default=None)),
            ("image_cache", Path | None, dataclasses.field(default=None)),
            ("num_workers", int, dataclasses.field(default=0)),
        ],
        frozen=True,
    )
    flags.__doc__ = f"""{inspect.getdoc(job)}

    Attributes:
      out: Folder of the results; a run that stopped there goes on.
      preset: {", ".join(job.presets)}.
      clean: Folder of clean representations that several runs share; --out keeps its own otherwise.
      image_cache: Folder of decoded images that runs share, encoders and hosts too: an image is
        decoded once for an input size and preparation. It changes no number and may be deleted.
      num_workers: Processes that decode images; more than 0 pays on many cores.
    """
    presets = {name: flags(job=preset, preset=name) for name, preset in job.presets.items()}
    module = sys.modules[job.__module__]
    description = module.__doc__ or job.__doc__ or ""
    return Command(run_job, flags, presets or None, description)


def run_job(flags: Any) -> None:
    """Runs a job and prints its summary."""
    summary = flags.job.run(
        flags.out,
        bank=flags.clean,
        image_cache=flags.image_cache,
        num_workers=flags.num_workers,
    )
    console.print(summary)
    for remark in JOBS[summary.job].remarks(summary):
        console.print(remark, markup=False, highlight=False)
    if flags.out is not None:
        console.print(f"Results in {flags.out}", markup=False, highlight=False)


def take_global_flags(words: Sequence[str]) -> tuple[list[str], Launch | None]:
    """Obeys the flags that every command has.

    `--plugin FILE.py` (or a module; also UR_JAX_PLUGINS) is imported before anything else, so that
    what it registers is known. `--coordinator HOST:PORT --num-processes N --process-id I` tell one
    of several processes who it is, where no launcher does.

    Returns:
      The other words, and who this process is, if that was given.

    Raises:
      UserError: for values that cannot be.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plugin", action="append", default=[])
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    try:
        known, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; one value belongs to each.") from error
    registry.load_plugins()
    for place in known.plugin:
        registry.load_plugins(place)
    return rest, launchers.explicit(known.coordinator, known.num_processes, known.process_id)


def check_place(flag: str, folder: Path | None) -> None:
    """Raises UserError for a folder that cannot be made, before anything is computed."""
    if folder is None or runs.is_in_bucket(folder) or folder.is_dir():
        return
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"Expected a folder as {flag}, got {folder}; {there} is a file.")
    if not os.access(there, os.W_OK):
        raise UserError(f"Expected {flag} where you may write, got {folder}; {there} is not.")


def keep_compilations() -> None:
    """Keeps compiled programs from one run to the next, in a folder of the user's cache.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "ur_jax"))


def list_buckets_anew() -> None:
    """Keeps no listing of a bucket in memory: other hosts write there too."""
    for protocol in ("gs", "gcs", "s3"):
        fsspec_config.conf.setdefault(protocol, {})["use_listings_cache"] = False


def parse(command: Command, args: Sequence[str], prog: str | None = None) -> Any:
    """Returns the flags of a command line, on top of its preset.

    A path may be of a bucket: what a flag gives for a `Path` is an `etils.epath.Path`.

    Raises:
      UserError: for an unknown preset, or flags that cannot be.
    """
    default: Any = tyro.MISSING
    if command.presets:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--preset", default=next(iter(command.presets)))
        try:
            preset = parser.parse_known_args(list(args))[0].preset
        except argparse.ArgumentError as error:
            raise UserError(
                f"Expected one of {', '.join(command.presets)} behind --preset, got none."
            ) from error
        if preset not in command.presets:
            raise unknown_name("preset", preset, command.presets)
        default = command.presets[preset]
    more = {} if default is tyro.MISSING else {"default": default}
    read = functools.partial(
        tyro.cli, command.flags, args=list(args), prog=prog, description=command.description,
        registry=_registry, **more,
    )  # fmt: skip
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return read()
    except SystemExit as ended:
        if ended.code != endings.BAD:  # --help
            raise
    raise UserError(f"{_in_one_line(_refusal(read))} See {prog or 'its'} --help.")


def _refusal(read: Callable[[], Any]) -> str:
    """The box in which the parser tells what it refuses, none of its lines broken."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.suppress(SystemExit):
            read()
    finally:
        os.environ.pop("COLUMNS")
        os.environ |= {} if before is None else {"COLUMNS": before}
    return told.getvalue()


def _in_one_line(box: str) -> str:
    """What is wrong, and near names, of the parser's box of several lines."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    rows = [row.strip("│ ") for row in plain if row[:1] not in "╭╰"]
    blocks = re.split(r"\n[─-]{5,}\n", "\n".join(rows))
    blocks = blocks if box.lstrip().startswith("╭") else blocks[1:]  # in ASCII, below its title
    what = " ".join(blocks[0].split()).rstrip(".")
    what = re.sub(r"^Error parsing (job\S*: )?", "", what)  # of settings, whose words name them
    near = re.findall(r"^(--\S+)", "".join(b for b in blocks[1:] if "you meant" in b), re.M)
    hint = f"; did you mean {' or '.join(dict.fromkeys(near[:3]))}?" if near else "."
    return f"{what}{hint}"


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


@_registry.primitive_rule
def _named_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Takes a name of what a notebook may give itself: an encoder, images, a probe."""
    metavars = {EncoderLike: "ENCODER", ImagesLike: "IMAGES", ProbeLike: "PROBE"}
    metavars |= {kind | None: metavar for kind, metavar in metavars.items()}
    if info.type not in metavars:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavars[info.type],
        instance_from_str=lambda texts: texts[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )


if __name__ == "__main__":
    sys.exit(main())
