"""Sets damaged files of run folders aside, so that repeating their command makes them anew:
`ur-jax repair FOLDER`.

Nothing is deleted: what is damaged moves to a folder `damaged` beside it. A run whose summary or
tables are damaged counts as not finished, and is merged again from its parts; one whose
`config.json` is damaged gets it back from its summary, or is set aside as a whole.
"""

from __future__ import annotations

from pathlib import Path

from ur_jax.runs import files
from ur_jax.runs.folder import set_aside
from ur_jax.runs.summary import Summary
from ur_jax.runs.verify import Config, problems

__all__ = ["Config", "main"]


def main(config: Config) -> int:
    """Sets aside what is damaged and says so; returns the exit status."""
    count = 0
    for path, reason in list(problems(config.folder)):
        if path.exists():  # it may have moved with its folder
            print(f"{path}: {reason}")
            print(f"  now at {repair(path)}")
            count += 1
    print(f"{count} damaged files were set aside; repeat the commands that made them.")
    return 0


def repair(path: Path) -> Path:
    """Sets one damaged file aside; returns where it is now."""
    if path.name == "config.json":
        return _repair_claim(path)
    if path.suffix == ".npz" and (summary := path.parents[2] / "summary.json").exists():
        set_aside(summary)  # merged again, once the part is there again
    return set_aside(path)


def _repair_claim(path: Path) -> Path:
    """Writes a run's claim again as its summary has it; without one, the run is set aside."""
    try:
        identity = Summary.read(path.parent / "summary.json").identity
    except (OSError, ValueError):
        return set_aside(path.parent)
    place = set_aside(path)
    files.write_json(path, identity)
    return place
