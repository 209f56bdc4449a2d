"""The whole benchmark: encoders x stages, in one command that can be killed and started again.

    python experiments/benchmark.py --preset cifar --encoders demo mine=runs/mine/encoder \\
        --images folder:cifar10/test --train-images folder:cifar10/train --workdir runs/cifar
    python experiments/benchmark.py --preset paper --encoders mocov2=mocov2.ckpt mae=mae.ckpt \\
        --images folder:pass --test-images tfds:imagenet2012/validation \\
        --train-images tfds:imagenet2012/train --pet-images folder:PetImages --workdir runs/paper

Prints the plan first, with samples and estimated time (`--dry-run` stops there), then runs what is
not finished: each stage in `WORKDIR/ENCODER/STAGE`, by the script that also runs alone. A stage
that is finished with the same settings is skipped, one whose settings, weights or images changed is
computed again, one that fails is reported and does not stop the others. Clean representations of an
encoder on a data set are computed once. Ends with `WORKDIR/RESULTS.csv` and `WORKDIR/report.html`;
the exit status is 1 if a stage failed or could not be run.

On several hosts (a TPU pod, `srun`, `mpirun`) start the same command on each, with a --workdir that
all of them see: images are divided over the hosts, batches over their devices, and the first host
merges.

`--compile-only v5e:16x16` runs nothing: it compiles every hot function for that TPU topology, on
any machine with libtpu, and prints whether it fits.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import command
import jax
import report
from matrix import PRESETS, Config, label_of, make_plan
from rich import box
from rich.table import Table

from ur_jax import runs
from ur_jax.devices import hosts
from ur_jax.encoders import loading
from ur_jax.performance import ahead
from ur_jax.runs import plan
from ur_jax.runs.plan import Plan, Stage

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


def main(config: Config) -> int:
    if config.compile_only is not None:
        return compile_only(config)
    command.console.quiet = not hosts.is_first()
    whole = make_plan(config)
    chosen = whole.select(config.only)
    hosts.on_all_hosts(True)  # all have read what is finished before anyone changes it
    command.console.print(plan_table(config, whole, chosen), highlight=False)
    for reason in dict.fromkeys(stage.missing for stage in chosen if stage.missing):
        command.console.print(f"cannot run: {reason}", markup=False, highlight=False)
    if config.dry_run:
        return 0
    if hosts.is_first():
        write_plan(config, whole)

    def on_begin(stage: Stage) -> None:
        command.console.rule(f"{stage.key}")

    outcomes = whole.run(chosen, on_begin)
    print_outcomes(outcomes)
    if hosts.is_first():
        report.main(report.Config(config.workdir))
    return int(any(o.state in ("failed", "blocked") for o in outcomes))


def plan_table(config: Config, whole: Plan, chosen: list[Stage]) -> Table:
    """The plan, with samples and time of what is to do."""
    device = runs.provenance()["device"]
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
        if state == "finished":
            table.add_row(stage.key, state, "", "")
            continue
        if stage.missing:
            table.add_row(stage.key, "cannot run", "", "")
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
    count = os.cpu_count() if device.platform == "cpu" else jax.local_device_count()
    return count * (per_device or _ASSUMED_SPEED["gpu"])


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, rounded."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def print_outcomes(outcomes: list[plan.Outcome]) -> None:
    """Says how the stages ended, failures last."""
    command.console.rule("Outcome")
    counts = {state: sum(o.state == state for o in outcomes) for state in
              ("finished", "skipped", "failed", "blocked")}  # fmt: skip
    seconds = duration(sum(o.seconds for o in outcomes))
    shown = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    command.console.print(f"{shown}; {seconds}", highlight=False)
    reasons: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.state in ("failed", "blocked"):
            reasons.setdefault((outcome.state, outcome.reason), []).append(outcome.key)
    for (state, reason), keys in reasons.items():
        text = f"{', '.join(keys)} {state}: {reason}"
        command.console.print(text, style="bold red", markup=False, highlight=False)


def write_plan(config: Config, whole: Plan) -> None:
    """Writes for each encoder which stages there should be and the command, for the report."""
    for text in config.encoders or loading.packaged():
        own = dataclasses.replace(config, encoders=(text,))
        flags = changed_flags(own, PRESETS[config.preset])
        words = ["python", "experiments/benchmark.py", "--preset", config.preset, *flags]
        stages = [s for s in whole.stages.values() if s.encoder == label_of(text)]
        planned = {
            "schema": runs.SCHEMA,
            "command": shlex.join(words),
            "stages": {stage.name: stage.missing for stage in stages},
        }
        runs.write_json(config.workdir / label_of(text) / "plan.json", planned)


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


def compile_only(config: Config) -> int:
    """Compiles the preset's hot functions for a TPU topology; prints what each needs."""
    names = config.encoders or loading.packaged()
    rows = []
    show: Callable[[str], None] = lambda text: command.console.print(text, highlight=False)
    for text in names:
        for row in ahead.compile_encoder(
            text.rpartition("=")[2],
            config.compile_only,
            protocol=config.protocol,
            center=config.certificates.center,
            dtype=config.dtype,
            on_progress=show,
        ):
            show(f"  {row.memory / 2**30:.2f} GiB per chip, {row.seconds:.0f} s to compile")
            rows.append(row)
    command.console.print(ahead.table(config.compile_only, rows))
    return int(not all(row.fits for row in rows))


if __name__ == "__main__":
    sys.exit(command.run(main, Config, PRESETS))
