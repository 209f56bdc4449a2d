"""A plan of many runs: what is finished is skipped, what changed is computed again, failures stay
where they happened, and nothing is deleted.

A stage is one job on one encoder in a folder of its own, `WORKDIR/ENCODER/STAGE`. Beside it,
`STAGE.json` records what was begun there: the fingerprint of the settings, whether it is finished,
how long it took on which hardware, and the error it ended in. Stages themselves resume. The results
of other settings are set aside, in `STAGE.old/DATE`.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ur_jax.devices import hosts
from ur_jax.errors import UserError, remedy_of
from ur_jax.runs import files
from ur_jax.runs.folder import OtherConfigurationError
from ur_jax.runs.provenance import SCHEMA, provenance

STATES = ("finished", "begun", "changed", "new")
"""Of a stage before it runs: "changed" is begun or finished with other settings."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One job on one encoder.

    Attributes:
      encoder: label of the encoder, the name of its folder.
      name: of the stage, the name of its folder within the encoder's.
      settings: what determines the results, as JSON values.
      run: computes them into the folder, resuming, and ends with its `summary.json`; on several
        hosts all call it, and it divides the work.
      requires: names of the encoder's stages that must be finished before.
      work: amount of computation, in floating-point operations; None if not known.
      samples: images that pass through the encoder, each step of an attack counted as 3.
      missing: what is wrong, so that it cannot run, a sentence; empty if nothing is.
      left_out: what was not given, so that it is not asked for, a sentence; empty if all was.
    """

    encoder: str
    name: str
    settings: Mapping[str, Any]
    run: Callable[[], Any]
    requires: tuple[str, ...] = ()
    work: float | None = None
    samples: int = 0
    missing: str = ""
    left_out: str = ""

    @property
    def key(self) -> str:
        """ENCODER/STAGE."""
        return f"{self.encoder}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a stage ended: "finished", "skipped" (was finished before), "failed", "blocked" (by what
    is wrong) or "left out" (by what was not given)."""

    key: str
    state: str
    seconds: float = 0.0
    reason: str = ""


class Plan:
    """Stages of some encoders in a working directory, in the order in which they run.

    Args:
      workdir: the working directory, of a file system or a bucket.
      stages: the stages; one that is required stands before those that require it.

    Raises:
      ValueError: for two stages of one name, or a requirement that is not there.
    """

    def __init__(self, workdir: Path, stages: Iterable[Stage]):
        self.workdir = files.as_folder(workdir)
        self.stages: dict[str, Stage] = {}
        self._fingerprints: dict[str, str] = {}
        for stage in stages:
            if stage.key in self.stages:
                raise UserError(f"Expected one stage {stage.key}, got two; name encoders apart.")
            required = {}
            for name in stage.requires:
                if f"{stage.encoder}/{name}" not in self._fingerprints:
                    raise UserError(f"Expected {stage.encoder}/{name} before {stage.key}.")
                required[name] = self._fingerprints[f"{stage.encoder}/{name}"]
            settings = {"schema": SCHEMA, "settings": stage.settings, "requires": required}
            self.stages[stage.key] = stage
            self._fingerprints[stage.key] = files.fingerprint(settings)

    def select(self, patterns: Sequence[str]) -> list[Stage]:
        """The stages whose ENCODER/STAGE fits one of the patterns, `*` for any; all for none.

        Raises:
          ValueError: for a pattern that no stage fits.
        """
        for pattern in patterns:
            if not any(fnmatchcase(key, pattern) for key in self.stages):
                raise UserError(
                    f"Expected ENCODER/STAGE of the plan, got {pattern!r}, which fits none of: "
                    f"{', '.join(self.stages)}."
                )
        chosen = lambda key: not patterns or any(fnmatchcase(key, p) for p in patterns)
        return [stage for key, stage in self.stages.items() if chosen(key)]

    def folder(self, stage: Stage) -> Path:
        """Where the results of a stage are."""
        return self.workdir / stage.encoder / stage.name

    def record(self, stage: Stage) -> dict[str, Any]:
        """What is on record of a stage; {} if it was never begun."""
        return read_record(self.folder(stage))

    def state(self, stage: Stage) -> str:
        """One of `STATES`."""
        record = self.record(stage)
        if not record:
            return "new"
        if record["fingerprint"] != self._fingerprints[stage.key]:
            return "changed"
        return "finished" if record["finished"] and self._has_summary(stage) else "begun"

    def _has_summary(self, stage: Stage) -> bool:
        """Whether a stage's summary is there and whole; a damaged one is written again."""
        path = self.folder(stage) / "summary.json"
        try:
            return path.exists() and bool(files.read_json(path))
        except UserError as error:
            warnings.warn(f"{error} The stage is merged again.", stacklevel=2)
            return False

    def run(self, stages: Sequence[Stage], on_begin: Callable[[Stage], Any]) -> list[Outcome]:
        """Runs stages in order; on several hosts, all of them call this with the same stages.

        Args:
          stages: from `select`.
          on_begin: called before each stage that runs.

        Returns:
          How each ended. An error in one does not stop the others; its traceback is in the record.

        Raises:
          OSError: where nothing can be written, or read, any more.
        """
        return [self._run_one(stage, on_begin) for stage in stages]

    def _run_one(self, stage: Stage, on_begin: Callable[[Stage], Any]) -> Outcome:
        """Runs one stage, unless it is finished or cannot be run."""
        state = self.state(stage)
        if state == "finished":
            return Outcome(stage.key, "skipped")
        if stage.missing:
            return Outcome(stage.key, "blocked", reason=stage.missing)
        if stage.left_out:
            return Outcome(stage.key, "left out", reason=stage.left_out)
        for name in stage.requires:
            if self.state(self.stages[f"{stage.encoder}/{name}"]) != "finished":
                reason = f"It needs {stage.encoder}/{name}, which is not finished."
                return Outcome(stage.key, "blocked", reason=reason)
        hosts.on_all_hosts(True)  # nobody changes the record before all have read it
        on_begin(stage)
        record = {
            "fingerprint": self._fingerprints[stage.key],
            "finished": False,
            "begun": self._begun(stage, state),
            "sessions": 1 if state in ("new", "changed") else self.record(stage)["sessions"] + 1,
            "samples": stage.samples,
            "work": stage.work,
        }
        if hosts.is_first():
            if state == "changed":
                self._set_aside(stage)
            self._write(stage, record)
        hosts.on_all_hosts(True)
        start, error = time.monotonic(), _error_of(stage)
        # Where the record is lost, the folder itself says that it is of other settings.
        if hosts.on_all_hosts(isinstance(error, OtherConfigurationError)).any():
            if hosts.is_first():
                self._set_aside(stage)
                self._write(stage, record)
            hosts.on_all_hosts(True)
            error = _error_of(stage)
        if error is not None and not hosts.is_first():  # whose record does not have it
            traceback.print_exception(error)
        seconds = time.monotonic() - start
        failed = hosts.on_all_hosts(error is not None)
        if not failed.any():
            record |= {"finished": True, "seconds": seconds, **_hardware(len(failed))}
            outcome = Outcome(stage.key, "finished", seconds)
        else:
            reason = f"{type(error).__name__}: {error}" if error else "Another host failed."
            record["error"] = "".join(traceback.format_exception(error)) if error else reason
            outcome = Outcome(stage.key, "failed", seconds, reason)
        if hosts.is_first():
            self._write(stage, record)
        if hosts.on_all_hosts(remedy_of(error) is not None).any():
            # A full disk is no fault of the stage: the others would end in it too.
            raise error or hosts.OtherHostError(f"{stage.key} failed on another host.")
        return outcome

    def _begun(self, stage: Stage, state: str) -> str:
        """The day and time of a stage's first session."""
        known = self.record(stage).get("begun") if state == "begun" else None
        return known or datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%SZ")

    def set_aside(self, stage: Stage) -> Path:
        """Where the results of a stage that changed are moved to; its day and time are those of
        what was begun."""
        begun = self.record(stage).get("begun") or "before"
        older = self.folder(stage).with_name(f"{stage.name}.old")
        place, number = older / begun, 2
        while place.exists():
            place, number = older / f"{begun}-{number}", number + 1
        return place

    def _set_aside(self, stage: Stage) -> None:
        """Moves the results of other settings out of the way, with their record."""
        place = self.set_aside(stage)
        files.move(self.folder(stage), place)
        files.move(_record_path(self.folder(stage)), place / "record.json")

    def _write(self, stage: Stage, record: Mapping[str, Any]) -> None:
        """Writes the record of a stage."""
        files.write_json(_record_path(self.folder(stage)), record)


def _error_of(stage: Stage) -> Exception | None:
    """Runs a stage; returns what it raised, whatever it is: the other stages go on."""
    try:
        stage.run()
    except Exception as raised:
        return raised
    return None


def read_record(folder: Path) -> dict[str, Any]:
    """What is on record of the stage in a folder; {} if it was never begun by a plan, or if the
    record is damaged: the folder itself knows whose results it holds."""
    path = _record_path(folder)
    try:
        record = files.read_json(path) if path.exists() else {}
    except UserError as error:
        warnings.warn(f"{error} The stage is looked at again.", stacklevel=2)
        return {}
    return record if {"fingerprint", "finished"} <= set(record) else {}


def speed(workdir: Path, device: str) -> float | None:
    """Floating-point operations per second of the finished stages that ran on such a device.

    Args:
      workdir: the working directory.
      device: as `provenance` has it.

    Returns:
      The speed, of stages that ran in one session; None if there are none.
    """
    work = seconds = 0.0
    for path in workdir.glob("*/*.json"):
        record = read_record(path.with_suffix(""))
        measured = record.get("finished") and record.get("work") and record.get("sessions") == 1
        if measured and record["device"] == device and record["hosts"] == 1:
            work, seconds = work + record["work"], seconds + record["seconds"]
    return work / seconds if seconds else None


def _record_path(folder: Path) -> Path:
    """Where the record of the stage in a folder is."""
    return folder.with_name(f"{folder.name}.json")


def _hardware(num_hosts: int) -> dict[str, Any]:
    """What a stage ran on."""
    return {"device": provenance()["device"], "hosts": num_hosts}
