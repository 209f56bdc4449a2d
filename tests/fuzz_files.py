"""Flipped bits and cut files in run folders and checkpoints: no wrong number, no lost row.

    PYTHONPATH=tests python tests/fuzz_files.py --count 240      # which end otherwise, if any

A case is a copy of a folder in which one file was damaged, and the command that made it, repeated.
It ends as "the same" (bytes of all tables and of the summary), or with an error of one line that
names what is damaged; after `ur-jax repair` and the same command again it ends as "the same" too,
but for an encoder's checkpoint, which nothing can bring back.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import io
import os
import pathlib
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Scene:
    """A folder, and what is repeated there.

    Attributes:
      name: of the job, and how far it was.
      folder: as it was left.
      repeat: runs the command on a copy of the folder; returns {name: bytes} of its results.
      whole: what it returns where nothing is damaged.
      can_repair: whether what is damaged can be made again.
    """

    name: str
    folder: pathlib.Path
    repeat: Callable[[pathlib.Path], dict[str, bytes]]
    whole: dict[str, bytes]
    can_repair: bool = True


def scenes(at: pathlib.Path, only: tuple[str, ...] = ()) -> list[Scene]:
    """Finished and stopped runs of every job, a benchmark, and an encoder's checkpoint.

    Args:
      at: a folder to make them in.
      only: the names of some; all by default.
    """
    import interrupted
    import tiny_encoder

    from ur_jax.jobs import benchmark, matrix
    from ur_jax.jobs.progress import quiet
    from ur_jax.probes.linear import ProbeConfig

    protocol = _protocol()
    tiny_encoder.save_images(at / "images", 24)
    tiny_encoder.save(at / "encoder")
    protocol.make("probe", at).run(at / "probe", progress=quiet, plots=False)
    found = []

    def add(name: str, job: Any, stop: int | None = None) -> None:
        if only and name not in only:
            return

        def repeat(folder: pathlib.Path) -> dict[str, bytes]:
            job.run(folder, progress=quiet, plots=False)
            return protocol.results(folder)

        whole = repeat(at / f"{name}-whole")
        folder = at / f"{name}-whole"
        if stop is not None:
            folder = at / f"{name}-stopped"
            with contextlib.suppress(KeyboardInterrupt):
                job.run(folder, progress=interrupted.stop_after(stop), plots=False)
        found.append(Scene(name, folder, repeat, whole))

    for name in protocol.SETTINGS:
        add(name, protocol.make(name, at))
    streamed = dataclasses.replace(
        protocol.make("probe", at), cached=False,
        training=ProbeConfig(num_epochs=3, learning_rate=0.1, batch_size=8),
    )  # fmt: skip
    add("probe, in its training", streamed, stop=5)
    add("train, in its training", protocol.make("train", at), stop=4)
    add("evaluate, stopped", protocol.make("evaluate", at), stop=7)

    def of_encoder(folder: pathlib.Path) -> dict[str, bytes]:
        job = protocol.make("knn", at, encoder=str(folder))
        job.run(folder.with_name("run"), progress=quiet, plots=False)
        return protocol.results(folder.with_name("run"))

    same = {scene.name: scene.whole for scene in found}["knn"]
    found.append(Scene("encoder", at / "encoder", of_encoder, same, can_repair=False))
    if only:
        return found

    config = dataclasses.replace(
        matrix.PRESETS["quick"], encoders=(f"tiny={at / 'encoder'}",),
        images=f"folder:{at / 'images'}", train_images=f"folder:{at / 'images'}",
        protocol=protocol.SETTINGS["evaluate"](at).protocol,
        probe=matrix.ProbeSettings(cached=True, augment=False, training=protocol.TRAINING),
        certificates=matrix.CertificateSettings(
            num_images=3, center=protocol.SETTINGS["certify"](at).config,
            randomized=dataclasses.replace(
                matrix.PRESETS["quick"].certificates.randomized, n=100, n0=20
            ),
        ),
        impersonation=protocol.SETTINGS["impersonate"](at).attack,
    )  # fmt: skip

    def of_benchmark(folder: pathlib.Path) -> dict[str, bytes]:
        status = benchmark.main(dataclasses.replace(config, workdir=folder))
        if status:
            raise AssertionError(f"status {status}")
        return {"RESULTS.csv": (folder / "RESULTS.csv").read_bytes()}

    whole = of_benchmark(at / "benchmark")
    found.append(Scene("benchmark", at / "benchmark", of_benchmark, whole))
    return found


def _protocol() -> Any:
    """The settings of all jobs' shared tests."""
    path = pathlib.Path(__file__).parent / "jobs" / "test_protocol.py"
    spec = importlib.util.spec_from_file_location("fuzzed_protocol", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files_of(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The files of a folder by kind, which are damaged in turn: there are many of some kinds."""
    found, checkpoints = collections.defaultdict(list), ("state", "encoder", "probe")
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix in (".png", ".html") or "tensorboard" in path.parts:
            continue
        place = path.relative_to(folder).parts
        kind = path.suffix if path.suffix in (".npz", ".parquet", ".csv") else path.name
        found[next((p for p in checkpoints if p in place[:-1]), kind)].append(path)
    return found


def damage(path: pathlib.Path, rng: random.Random) -> str:
    """Damages a file; says how."""
    content = bytearray(path.read_bytes())
    how = rng.choice(("flip", "flip", "cut", "zeros"))
    place = rng.randrange(len(content)) if content else 0
    if how == "flip" and content:
        content[place] ^= 1 << rng.randrange(8)
    elif how == "zeros":  # a block that never reached the disk
        content[place:] = bytes(len(content) - place)
    else:
        content = content[:place]
    path.write_bytes(content)
    return f"{how} at {place} of {path.stat().st_size}"


def outcome(scene: Scene, at: pathlib.Path, path: pathlib.Path, rng: random.Random) -> str:
    """How a scene ends with one of its files damaged."""
    from ur_jax.errors import UserError
    from ur_jax.runs import repair

    place = at / "copy" / "folder"
    shutil.rmtree(place.parent, ignore_errors=True)
    shutil.copytree(scene.folder, place)
    damaged = place / path.relative_to(scene.folder)
    how = damage(damaged, rng)
    before = damaged.read_bytes()
    what = f"{scene.name}: {path.relative_to(scene.folder)}, {how}"

    def repeated() -> str:
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = scene.repeat(place)
        except UserError as error:
            is_line = "\n" not in str(error) and os.fspath(place) in str(error)
            return "named" if is_line else f"NOT NAMED {error}"
        except Exception as error:
            return f"FAULT {type(error).__name__}: {error}".splitlines()[0]
        return "the same" if found == scene.whole else "OTHER RESULTS"

    ended = repeated()
    if ended == "named" and scene.can_repair:
        with contextlib.redirect_stdout(io.StringIO()):
            repair.main(repair.Config(place))
        if damaged.name == "metrics.csv":  # as the error says: it is a log, and has no copy
            damaged.unlink()
        again = repeated()
        ended = "named, repaired" if again == "the same" else f"NOT REPAIRED: {again}"
    elif ended == "the same":
        is_made = not damaged.exists() or damaged.read_bytes() != before
        ended = "made again" if is_made else "not affected"
    return ended if ended[0].islower() else f"{ended}  ({what})"


def cases(found: list[Scene], count: int, seed: int = 0) -> list[tuple[Scene, pathlib.Path]]:
    """Files to damage: of every scene and kind in turn."""
    rng, made = random.Random(seed), []
    kinds = [(scene, paths) for scene in found for paths in files_of(scene.folder).values()]
    rng.shuffle(kinds)
    while len(made) < count:
        made += [(scene, rng.choice(paths)) for scene, paths in kinds]
    return made[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    import tiny_encoder

    from ur_jax.jobs import Job
    from ur_jax.jobs.progress import console

    console.quiet = True
    Job.doubt = lambda self: ()
    ended: collections.Counter[str] = collections.Counter()
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder, tiny_encoder.stands_for_demo():
        at = pathlib.Path(folder)
        found = scenes(at)
        for number, (scene, path) in enumerate(cases(found, flags.count, flags.seed)):
            how = outcome(scene, at, path, rng)
            ended[how.partition("  (")[0] if how[:1].islower() else "WRONG"] += 1
            if how[:1].isupper():
                print(how, file=sys.stderr, flush=True)
            if number % 50 == 49:
                print(f"{number + 1} of {flags.count}: {dict(ended)}", file=sys.stderr, flush=True)
    print(", ".join(f"{number} {how}" for how, number in ended.most_common()))
    return int(bool(ended["WRONG"]))


if __name__ == "__main__":
    here = pathlib.Path(__file__).parent
    sys.path[:0] = [str(here.parent), str(here)]
    sys.exit(main())
