"""Which of timm's architectures import, with what error and at what speed.

    python -m ur_jax.encoders.bridge.sweep --out sweep.jsonl            # goes on where it stopped
    python -m ur_jax.encoders.bridge.sweep --out sweep.jsonl --table    # what is in the file

Of each of timm's model files the two smallest architectures by name, with random weights; none is
downloaded. A line of JSON per architecture: whether `torch.export` takes it, whether the bridge
does, the largest relative difference from PyTorch, seconds and images per second.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_SMALL = """test atto femto pico nano tiny mini xxt xxs xt xs x0_5 050 s0 b0 m0 t0 18 10 14 small
    _s_ _s mobile lite 26 b1 s1 xsmall zepto""".split()
_LARGE = ("large", "giant", "huge", "enormous", "gigantic", "so400m", "412m", "570m", "_7b")
_UNOPTIMISED: Any = {"xla_backend_optimization_level": 0}
_BATCH, _REPEATS = 4, 2


def chosen(per_file: int = 2) -> list[tuple[str, str]]:
    """(model file, architecture): the smallest by name of each of timm's model files."""
    from ur_jax.encoders.bridge.packages import import_timm

    timm: Any = import_timm()
    files = collections.defaultdict(list)
    for name in timm.list_models():
        files[timm.models.model_entrypoint(name).__module__.rpartition(".")[2]].append(name)
    large = lambda name: 100 * any(word in name for word in _LARGE)
    rank = lambda name: (
        large(name) + next((i for i, word in enumerate(_SMALL) if word in name), len(_SMALL))
    )
    size = lambda name: max((timm.get_pretrained_cfg(name) or _Unknown).input_size)
    key = lambda n: (large(n), size(n), rank(n), len(n), n)
    ranked = {file: sorted(names, key=key) for file, names in sorted(files.items())}
    return [
        (file, names[place])
        for place in range(per_file)
        for file, names in ranked.items()
        if place < len(names)
    ]


class _Unknown:
    """Of an architecture without a configuration."""

    input_size = (3, 224, 224)


def randomised(module: Any, seed: int = 0) -> Any:
    """The module with weights under which every branch counts: new layers are often zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    noise = lambda x: torch.randn(x.shape, generator=generator)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() and float(parameter.max() - parameter.min()) < 1e-6:
                # Around 1 where it scales, of a size that shows where it was next to nothing.
                parameter.copy_(parameter.round().clamp(0, 1) + 0.1 * noise(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(1.0 + 0.2 * noise(buffer).abs())
    return module.eval()


def tried(
    name: str, *, size: int | None = None, gradient: bool = False, quick: bool = False
) -> dict[str, Any]:
    """Imports one architecture and compares it with PyTorch; quick: without its speed."""
    import jax
    import torch

    from ur_jax.encoders.bridge.module import from_torch
    from ur_jax.encoders.bridge.packages import import_timm
    from ur_jax.errors import UserError

    timm: Any = import_timm()
    torch.manual_seed(0)
    module = randomised(timm.create_model(name, num_classes=0))
    height, width = module.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    if size is not None:
        height = width = size
    record: dict[str, Any] = {"input": [height, width]}
    record["parameters"] = sum(p.numel() for p in module.parameters())
    start = time.monotonic()
    try:
        encoder = from_torch(module, input_size=(height, width), name=name, check=False)
    except UserError as error:
        text = str(error)
        record["result"] = "no export" if "cannot be exported" in text else "refused"
        return {**record, "error": text[:400]}
    record["seconds_import"] = round(time.monotonic() - start, 1)
    images = np.random.default_rng(0).standard_normal((_BATCH, height, width, 3))
    images = images.astype(np.float32)
    given = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    if quick:
        images, given = images[:2], given[:2]
    with torch.no_grad():
        wanted = module(given).numpy()
        if not quick:
            record["torch_images_per_s"] = round(_BATCH / _fastest(lambda: module(given)), 2)
    start = time.monotonic()
    run = jax.jit(encoder.apply_fn, compiler_options=_UNOPTIMISED if quick else None)
    got = np.asarray(run(encoder.params, images))
    record["seconds_compile"] = round(time.monotonic() - start, 1)
    if not quick:
        seconds = _fastest(lambda: jax.block_until_ready(run(encoder.params, images)))
        record["jax_images_per_s"] = round(_BATCH / seconds, 2)
    record["dimension"] = encoder.dimension
    record["difference"] = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    if gradient:
        record["gradient_difference"] = gradient_difference(module, encoder, images[:2])
    record["result"] = "same" if record["difference"] < 1e-4 else "differs"
    return record


def gradient_difference(module: Any, encoder: Any, images: np.ndarray) -> float:
    """Relative l2 difference of the gradients of a random projection by the images."""
    import jax
    import torch

    direction = np.random.default_rng(1).standard_normal(encoder.dimension).astype(np.float32)
    given = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().requires_grad_(True)
    (module(given) @ torch.from_numpy(direction)).sum().backward()
    assert given.grad is not None
    wanted = given.grad.permute(0, 2, 3, 1).numpy()
    projected = lambda x: (encoder.apply_fn(encoder.params, x) @ direction).sum()
    got = np.asarray(jax.jit(jax.grad(projected))(images))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def _fastest(function: Any) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(_REPEATS):
        start = time.monotonic()
        function()
        seconds.append(time.monotonic() - start)
    return min(seconds)


def _records(path: Path) -> dict[str, dict[str, Any]]:
    """What is in the file, by name; a torn last line is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["name"]] = record
    return found


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _work(path: Path, names: list[tuple[str, str]], options: dict[str, bool]) -> None:
    """Tries architectures in this process."""
    for file, name in names:
        try:
            record = tried(name, **options)
        except Exception as error:
            record = {"result": "failed", "error": f"{type(error).__name__}: {error}"[:400]}
        _append(path, {"name": name, "file": file, **record})


def _supervise(
    path: Path, names: list[tuple[str, str]], limit: float, options: dict[str, bool]
) -> None:
    """Tries what is missing in a process of its own, which is started anew where one takes long."""
    while left := [pair for pair in names if pair[1] not in _records(path)]:
        flags = [f"--{name}" for name, is_set in options.items() if is_set]
        arguments = ["--out", str(path), "--worker", *flags]
        only = ",".join(f"{file}:{name}" for file, name in left[:20])
        command = [sys.executable, "-m", "ur_jax.encoders.bridge.sweep", *arguments, "--only", only]
        worker = subprocess.Popen(command)
        count, since = len(_records(path)), time.monotonic()
        while worker.poll() is None:
            time.sleep(1)
            if len(_records(path)) > count:
                count, since = len(_records(path)), time.monotonic()
            if time.monotonic() - since > limit:
                worker.kill()
                worker.wait()
        if len(_records(path)) == count and worker.returncode:
            file, name = next(pair for pair in left if pair[1] not in _records(path))
            why = "too long" if worker.returncode < 0 else "the process ended"
            _append(path, {"name": name, "file": file, "result": "failed", "error": why})


def table(records: dict[str, dict[str, Any]]) -> str:
    """A table in Markdown, a line for each of timm's model files."""
    files = collections.defaultdict(list)
    for record in records.values():
        files[record["file"]].append(record)
    counts = collections.Counter(record["result"] for record in records.values())
    exported = len(records) - counts["no export"]
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("timm", "torch", "jax")
    )
    lines = [
        f"{len(records)} architectures of {len(files)} model files: {counts['same']} give "
        f"PyTorch's representation, of {exported} that `torch.export` takes ({versions}).",
        "",
        "| file | architecture | input | result | difference | images/s, JAX : PyTorch | import, "
        "compile (s) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for file, group in sorted(files.items()):
        for r in group:
            if "difference" in r:
                shown = f"{r['difference']:.0e}"
                speed = "-"
                if "jax_images_per_s" in r:
                    speed = f"{r['jax_images_per_s']:.3g} : {r['torch_images_per_s']:.3g}"
                times = f"{r['seconds_import']:.0f}, {r['seconds_compile']:.0f}"
            else:
                shown, speed, times = "", "", r["error"].replace("|", "/")[:120]
            side = r.get("input", ["-"])[0]
            row = (file, r["name"], str(side), r["result"], shown, speed, times)
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--per-file", type=int, default=2, help="architectures of each model file")
    parser.add_argument("--limit", type=float, default=300, help="seconds for an architecture")
    parser.add_argument("--gradient", action="store_true", help="compare image gradients, too")
    parser.add_argument("--quick", action="store_true", help="without speeds; compiles faster")
    parser.add_argument("--table", action="store_true", help="print the table of the file and stop")
    parser.add_argument("--only", default="", help="FILE:NAME,... instead of all")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        print(table(_records(given.out)))
        return
    options = {"gradient": given.gradient, "quick": given.quick}
    pairs: list[Any] = [tuple(item.partition(":")[::2]) for item in given.only.split(",") if item]
    if given.worker:
        _work(given.out, pairs, options)
        return
    _supervise(given.out, pairs or chosen(given.per_file), given.limit, options)
    print(table(_records(given.out)))


if __name__ == "__main__":
    main()
