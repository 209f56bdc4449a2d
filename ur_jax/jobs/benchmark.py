"""The benchmark: every encoder through every stage, resumable, on any number of hosts.

    python experiments/benchmark.py --preset quick --encoders demo mine=file.py:make \\
        --workdir runs/benchmark
    python experiments/benchmark.py --encoders mocov2=moco_v2_200ep_pretrain.pth.tar \\
        --images folder:pass --test-images tfds:imagenet2012/validation \\
        --train-images tfds:imagenet2012/train --pet-images folder:PetImages --workdir runs/paper

Prints the plan first, with samples and estimated time (`--dry-run` stops there), then runs what is
not finished: each stage in `WORKDIR/ENCODER/STAGE`, the same job that also runs alone. A stage that
is finished with the same settings is skipped; one whose settings, weights or images changed is
computed again, its old results set aside in `STAGE.old`; one that fails is reported and does
not stop the others. Clean representations of an encoder on a data set are computed once. Ends with
`WORKDIR/RESULTS.csv` and `WORKDIR/report.html`; the exit status is 1 if a stage failed or could not
be run.

On several hosts (a TPU pod, `srun`, `mpirun`) start the same command on each, with a --workdir that
all of them see: images are divided over the hosts, batches over their devices, and the first host
merges.

`--compile-only h100:8` (or `v5e:16x16`) runs nothing: it compiles every hot function for those GPUs
(that TPU topology) on any machine with the compiler, and prints what the programs do there.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from typing import Any

import jax
from rich import box
from rich.table import Table

from ur_jax.devices import hosts
from ur_jax.encoders import loading
from ur_jax.errors import MissingPackageError
from ur_jax.jobs.matrix import PRESETS, Config, EncoderEntry, make_plan
from ur_jax.jobs.progress import console
from ur_jax.runs import lock, plan, provenance, write_json
from ur_jax.runs.plan import Plan, Stage

__all__ = ["PRESETS", "Config", "main"]

# Floating-point operations per second, per CPU core or accelerator, before anything is measured:
# rough, for planning. A U-PGD step of ResNet-20 reached 2.5e10 on a core; accelerators are counted
# at 30 % of their peak.
_ASSUMED_SPEED = {
    "cpu": 2.5e10,
    "TPU v4": 0.3 * 275e12,
    "TPU v5 lite": 0.3 * 197e12,
    "TPU v5": 0.3 * 459e12,
    "TPU v6 lite": 0.3 * 918e12,
    "gpu": 0.3 * 156e12,
}
_WRONG = ("failed", "blocked")


def main(config: Config) -> int:
    """Runs what is not finished; returns the exit status."""
    if config.compile_only is not None:
        return compile_only(config, config.compile_only)
    whole = make_plan(config)
    chosen = whole.select(config.only)
    if config.dry_run:
        show_plan(config, whole, chosen)
        return 0
    with lock.held(whole.workdir):
        show_plan(config, whole, chosen)
        hosts.on_all_hosts(True)  # all have read what is finished before anyone changes it
        if hosts.is_first():
            write_plan(config, whole)
        outcomes = whole.run(chosen, lambda stage: console.rule(stage.key))
        print_outcomes(outcomes)
        if hosts.is_first():
            write_report(config)
    return int(any(outcome.state in _WRONG for outcome in outcomes))


def show_plan(config: Config, whole: Plan, chosen: Sequence[Stage]) -> None:
    """Prints the plan, what cannot run and why, and what will be set aside."""
    console.print(plan_table(config, whole, chosen), highlight=False)
    for reason in dict.fromkeys(stage.missing for stage in chosen if stage.missing):
        console.print(f"cannot run: {reason}", markup=False, highlight=False)
    for reason in dict.fromkeys(stage.left_out for stage in chosen if stage.left_out):
        count = sum(stage.left_out == reason for stage in chosen)
        console.print(f"{count} stages are left out: {reason}", markup=False, highlight=False)
    for stage in chosen:
        if whole.state(stage) == "changed" and not (stage.missing or stage.left_out):
            place = whole.set_aside(stage).relative_to(whole.workdir)
            text = f"{stage.key} has results of other settings: they are moved to {place}"
            console.print(text, markup=False, highlight=False)


def plan_table(config: Config, whole: Plan, chosen: Sequence[Stage]) -> Table:
    """The plan, with samples and time of what is to do."""
    device = provenance()["device"]
    measured = plan.speed(config.workdir, device)
    speed = measured or assumed_speed()
    basis = "as measured here before" if measured else "assumed, nothing is measured yet"
    table = Table(
        title=f"{config.workdir}: {len(chosen)} stages on {jax.process_count()} x {device}",
        caption=f"Time at {speed:.1e} operations/s per host ({basis}), without compiling; "
        "certificates that stop early need less.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("encoder/stage", no_wrap=True)
    table.add_column("state")
    for column in ("samples", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    total, total_samples = 0.0, 0
    for stage in chosen:
        state = whole.state(stage)
        if state == "finished" or stage.missing or stage.left_out:
            wrong = "cannot run" if stage.missing else "left out"
            table.add_row(stage.key, state if state == "finished" else wrong, "", "")
            continue
        seconds = stage.work / speed / jax.process_count() if stage.work else None
        total, total_samples = total + (seconds or 0.0), total_samples + stage.samples
        shown = "unknown" if seconds is None else duration(seconds)
        table.add_row(stage.key, state, f"{stage.samples:,}", shown)
    table.add_section()
    table.add_row("to do", "", f"{total_samples:,}", duration(total))
    return table


def assumed_speed() -> float:
    """Operations per second of this host's devices, by their kind."""
    device = jax.local_devices()[0]
    per_device = _ASSUMED_SPEED.get(device.device_kind, _ASSUMED_SPEED.get(device.platform))
    count = (os.cpu_count() or 1) if device.platform == "cpu" else jax.local_device_count()
    return count * (per_device or _ASSUMED_SPEED["gpu"])


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, rounded."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def print_outcomes(outcomes: Sequence[plan.Outcome]) -> None:
    """Says how the stages ended, failures last."""
    console.rule("Outcome")
    counts = {
        state: sum(outcome.state == state for outcome in outcomes)
        for state in ("finished", "skipped", "left out", *_WRONG)
    }
    seconds = duration(sum(outcome.seconds for outcome in outcomes))
    shown = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(f"{shown}; {seconds}", highlight=False)
    reasons: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.state in _WRONG:
            reasons.setdefault((outcome.state, outcome.reason), []).append(outcome.key)
    for (state, reason), keys in reasons.items():
        text = f"{', '.join(keys)} {state}: {reason}"
        console.print(text, style="bold red", markup=False, highlight=False)


def write_plan(config: Config, whole: Plan) -> None:
    """Writes for each encoder which stages there should be and the command, for the report."""
    for text in config.encoders or loading.packaged():
        label = EncoderEntry.of(text).label
        own = dataclasses.replace(config, encoders=(text,))
        flags = changed_flags(own, PRESETS[config.preset])
        words = ["ur-jax", "benchmark", "--preset", config.preset, *flags]
        stages = [stage for stage in whole.stages.values() if stage.encoder == label]
        planned = {
            "command": shlex.join(words),
            "stages": {stage.name: stage.missing or stage.left_out for stage in stages},
        }
        write_json(whole.workdir / label / "plan.json", planned)


def changed_flags(config: Any, default: Any, prefix: str = "--") -> list[str]:
    """The flags that make `config` of `default`, but for those that choose what to do."""
    flags: list[str] = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if value == usual or field.name in ("preset", "only", "dry_run", "compile_only"):
            continue
        name = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            flags += changed_flags(value, usual, f"{name}.")
        elif isinstance(value, bool):
            flags.append(name if value else f"{prefix}no-{field.name.replace('_', '-')}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            flags += [name, *map(str, values)]
    return flags


def write_report(config: Config) -> None:
    """The table of all numbers and, where what draws it is installed, the page."""
    from ur_jax.report import build  # the report reads jobs, so it lies above them

    try:
        build.main(build.Config(config.workdir))
    except MissingPackageError as error:
        text = f"RESULTS.csv is written, but no page. {error}"
        console.print(text, highlight=False, markup=False)  # "[report]" is no style


def compile_only(config: Config, name: str) -> int:
    """Compiles the preset's hot functions for GPUs or a TPU topology; prints what each needs."""
    from ur_jax.performance import ahead  # above the jobs, whose functions it compiles

    target, rows = ahead.find(name), []
    show = lambda text: console.print(text, highlight=False)
    for text in config.encoders or loading.packaged():
        for row in ahead.compile_encoder(
            EncoderEntry.of(text).place,
            target,
            protocol=config.protocol,
            center=config.certificates.center,
            dtype=config.dtype,
            on_progress=show,
        ):
            outside = f"collectives outside loops: {ahead.listed(row.outer)}"
            show(f"  {row.items:,} {row.unit}s a call, {row.seconds:.0f} s to compile, {outside}")
            console.print(ahead.kernel_table(target, row))
            rows.append(row)
    console.print(ahead.table(target, rows))
    return int(not all(row.fits for row in rows))
