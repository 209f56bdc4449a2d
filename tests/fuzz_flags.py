"""Bad flags of every command, by generated kinds: each ends in one line, status 2, none computes.

    PYTHONPATH=tests python tests/fuzz_flags.py --count 1000      # which fail, if any

A case is a command that would run, with one flag replaced by a value that cannot be meant: of
another type, out of range, not finite, a place that is not there, a name that is none, no value.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import pathlib
import random
import re
import sys
import tempfile
import types
import typing
import warnings
from typing import Any, Literal

ANY_INTEGER = {"seed"}
"""Flags that take any whole number of 32 bits."""
NEVER_BAD = {
    ("budget", "inf"),
    ("step", "1" + "0" * 30),  # all samples at once
    ("first", None),  # of a benchmark without a probe
    ("second", None),
    ("record", None),  # words
}
"""(last part of a flag or COMMAND.FLAG, value) of values that are meant; None for all."""

OPTIONAL = (("knn", "--out"), ("throughput", "--out"), ("impersonate", "--probe"))
_UNKNOWN = (
    ("--no-such-flag",),
    ("--no-such-flag", "1"),
    ("stray",),
    ("--plugin", "/no.py"),
    ("--coordinator", "here"),
    ("--process-id", "1"),
    ("--num-processes", "x"),
    ("--preset", "nope"),
)


class Computed(BaseException):
    """A bad value was not refused before the work began."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One command line.

    Attributes:
      command: its name.
      kind: what is wrong, in words.
      flag: the flag that is bad.
      words: the flags.
    """

    command: str
    kind: str
    flag: str
    words: tuple[str, ...]


def valid_words(folder: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Flags of each command with which it would run, on what `prepare` wrote."""
    given = ("--encoder", f"{folder}/encoder", "--images", f"folder:{folder}/images")
    out, images = ("--out", f"{folder}/out"), f"folder:{folder}/images"
    test = ("--test-images", images)
    few = ("--num-images", "10")
    return {
        "evaluate": (*given, *out, *few, "--batch-size", "8"),
        "certify": (*given, *out, *few),
        "probe": (*given, *out, *test),
        "impersonate": (*given, *out, "--probe", f"{folder}/probe/probe"),
        "knn": (*given, *out, *test, "--k", "3"),
        "train": ("--images", images, *out),
        "benchmark": (
            *("--workdir", f"{folder}/out", "--encoders", f"tiny={folder}/encoder"),
            *("--images", images, "--protocol.num-images", "10"),
        ),
        "report": (f"{folder}/nothing",),
        "verify": (f"{folder}/nothing",),
        "repair": (f"{folder}/nothing",),
        "convert-weights": ("resnet50", f"{folder}/nothing.pth", f"{folder}/converted"),
        "throughput": (*out, "--encoders", "demo"),
    }


def prepare(folder: pathlib.Path) -> None:
    """Writes an encoder, images and a probe."""
    import processes
    import tiny_encoder

    from ur_jax.jobs.probe import Probe
    from ur_jax.jobs.progress import quiet
    from ur_jax.probes.linear import ProbeConfig

    with tiny_encoder.stands_for_demo():
        processes.prepare(folder)
        images = f"folder:{folder}/images"
        Probe(
            encoder=f"{folder}/encoder", images=images, test_images=images, cached=True,
            training=ProbeConfig(num_epochs=1, learning_rate=0.1, batch_size=8),
        ).run(folder / "probe", progress=quiet, plots=False)  # fmt: skip


def leaves(command: str) -> list[tuple[str, Any]]:
    """(flag, type) of a command, from its own help's words for them."""
    from ur_jax import cli

    found: list[tuple[str, Any]] = []

    def walk(kind: type, prefix: str) -> None:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint, flat = hints.get(field.name, field.type), "OmitArgPrefixes" in str(field.type)
            if dataclasses.is_dataclass(hint):
                inner = prefix if flat or field.name == "job" else f"{prefix}{field.name}."
                walk(typing.cast(type, hint), inner)
            elif "Suppress" not in str(field.type) and "Positional" not in str(field.type):
                found.append((prefix + field.name, hint))

    walk(cli.find(command).flags, "")
    return found


def bad_values(flag: str, hint: Any) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, words) that no flag of a type takes."""
    name = flag.rpartition(".")[2]
    kinds = (
        set(typing.get_args(hint))
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else {hint}
    )
    element = next((typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is tuple), None)
    kinds |= {element} if element else set()
    values: list[tuple[str, tuple[str, ...]]] = [] if element else [("no value", ())]
    if bool in kinds:
        return [("wrong type", ("maybe",))]
    if int in kinds:
        values += [("wrong type", ("many",)), ("wrong type", ("2.5",)), ("wrong type", ("nan",))]
        values += [("huge", ("1" + "0" * 30,))]
        values += [] if name in ANY_INTEGER else [("negative", ("-3",))]
    elif float in kinds:
        values += [("wrong type", ("much",)), ("not finite", ("nan",)), ("not finite", ("inf",))]
        values += [("negative", ("-0.5",))]
    elif any(typing.get_origin(k) is Literal for k in kinds):
        values += [("wrong name", ("nope",)), ("wrong name", ("",))]
    elif pathlib.Path in kinds:
        values += [("not a folder", (__file__,)), ("not a folder", (f"{__file__}/below",))]
    elif name in ("prefix", "against", "class_map", "only"):
        values += [("wrong name", ("no/such=thing/at all",))]
    elif str in kinds:
        values += [("wrong name", ("nope",)), ("wrong name", ("/nowhere/at/all",))]
        if "images" in name:
            values += [("wrong name", (text,)) for text in ("folder:", "tfds:nope/x", "demo:x")]
        if "encoder" in name:
            values += [("wrong name", (text,)) for text in ("no_module:make", "/no.py:make", ":")]
    return values


def cases(folder: pathlib.Path, count: int, seed: int = 0) -> list[Case]:
    """Cases of every command: all of them, or a sample of `count`."""
    made = []
    for command, words in valid_words(folder).items():
        for flag, hint in leaves(command):
            word = f"--{flag.replace('_', '-')}"
            for kind, value in bad_values(flag, hint):
                names = (flag.rpartition(".")[2], f"{command}.{flag}")
                if not NEVER_BAD & {(name, word) for name in names for word in (None, *value)}:
                    made.append(Case(command, kind, word, (*_without(words, word), word, *value)))
        for extra in _UNKNOWN:
            made.append(Case(command, "unknown", extra[0], (*words, *extra)))
        for number in range(0, len(words) - 1, 2):  # what has to be given is left out
            if words[number] in ("--encoder", "--out", "--probe") or (
                "images" in words[number] and "num" not in words[number] and command != "benchmark"
            ):
                rest = (*words[:number], *words[number + 2 :])
                if (command, words[number]) not in OPTIONAL:
                    made.append(Case(command, "left out", words[number], rest))
    chosen = random.Random(seed)
    chosen.shuffle(made)
    repeated = made * -(-count // len(made)) if count > len(made) else made
    return [
        _together(case, other) if number >= len(made) else case
        for number, (case, other) in enumerate(zip(repeated[:count], reversed(repeated)))
    ]


def _together(case: Case, other: Case) -> Case:
    """Two bad flags of one command at once."""
    if case.command != other.command or case.kind in ("no value", "left out"):
        return case
    words = tuple(word for word in other.words if word not in case.words)
    return dataclasses.replace(
        case, kind=f"{case.kind} and {other.kind}", words=case.words + words[-2:]
    )


def _without(words: tuple[str, ...], word: str) -> tuple[str, ...]:
    """Words without a flag and its one value."""
    if word not in words:
        return words
    at = words.index(word)
    return words[:at] + words[at + 2 :]


@contextlib.contextmanager
def nothing_computes():
    """A `with` in which a command that gets to its work raises `Computed` instead."""
    from unittest import mock

    from ur_jax import performance
    from ur_jax.errors import UserError
    from ur_jax.jobs import base
    from ur_jax.runs.plan import Plan

    def computed(*_, **__):
        raise Computed

    def planned(plan, *_):
        """An encoder that cannot be loaded is told in the plan: the others' stages run."""
        if not all(stage.missing or stage.left_out for stage in plan.stages.values()):
            raise Computed
        raise UserError("Told in the plan.")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(base, "_is_computed", computed))
        stack.enter_context(mock.patch.object(Plan, "run", planned))
        stack.enter_context(mock.patch.object(performance, "run", computed))
        yield


def outcome(case: Case) -> str:
    """How a case ended: "refused", a traceback's last line, "computed", "status 0", "N lines"."""
    from ur_jax import cli

    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        cli.console.file = out
        try:
            status = cli.run(case.command, case.words)
        except SystemExit as ended:
            return f"exit {ended.code}"
        except Computed:
            return "computed"
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            cli.console.file = None
    said = [line for line in out.getvalue().splitlines() if line.strip()]
    if status != 2:
        return f"status {status}: {said[-1] if said else ''}"
    told = [line for line in said if re.match(r"(host \d+: )?error: ", line)]
    if told and "Told in the plan" in told[-1]:
        return "refused"
    return "refused" if len(told) == 1 and said[-1] == told[0] else f"{len(said)} lines: {said[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="of one command")
    flags = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    import tiny_encoder

    failed: dict[tuple, list[Case]] = collections.defaultdict(list)
    number = 0
    with tempfile.TemporaryDirectory() as folder, tiny_encoder.stands_for_demo():
        place = pathlib.Path(folder)
        prepare(place)
        with nothing_computes():
            for case in cases(place, flags.count, flags.seed):
                if flags.only in ("", case.command):
                    number += 1
                    if (ended := outcome(case)) != "refused":
                        failed[case.command, case.flag, ended[:150]].append(case)
                        shown = " ".join((case.command, *case.words[-3:]))
                        print(f"{shown}: {ended[:150]}", file=sys.stderr, flush=True)
    for (command, flag, ended), those in sorted(failed.items()):
        print(f"{command} {flag} ({', '.join(sorted({c.kind for c in those}))}): {ended}")
    print(f"{number} bad command lines, {sum(map(len, failed.values()))} not refused in one line")
    return int(bool(failed))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    sys.exit(main())
