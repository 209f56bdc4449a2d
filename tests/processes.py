"""Commands in processes of their own, on tiny data."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import tiny_encoder

_TESTS = pathlib.Path(__file__).parent
COMMAND = (sys.executable, "-m", "ur_jax.cli")
TINY = ("--plugin", str(_TESTS / "tiny_plugin.py"))
PROTOCOL = (
    *("--num-images", "10", "--eps", "0.05", "--read-at", "1", "2", "--overlap-steps", "2"),
    *("--breakaway-steps", "1", "--num-distribution", "None", "--batch-size", "8"),
)
"""Flags of `evaluate` that take a second."""


def prepare(folder: pathlib.Path, num_images: int = 22) -> None:
    """Writes an encoder and images into a folder."""
    tiny_encoder.save_images(folder / "images", num_images)
    tiny_encoder.save(folder / "encoder")


def evaluate(folder: pathlib.Path, out: str | os.PathLike, *more: str) -> tuple[str, ...]:
    """The words of `evaluate` on what `prepare` wrote."""
    return ("evaluate", *_given(folder, out), *PROTOCOL, *more)


def knn(folder: pathlib.Path, out: str | os.PathLike) -> tuple[str, ...]:
    """The words of `knn`, of all jobs the quickest, on what `prepare` wrote."""
    test_images = ("--test-images", f"folder:{folder}/images")
    return ("knn", *_given(folder, out), *test_images, "--k", "3", "--batch-size", "8")


def _given(folder: pathlib.Path, out: str | os.PathLike) -> tuple[str, ...]:
    given = ("--encoder", f"{folder}/encoder", "--images", f"folder:{folder}/images")
    return (*TINY, *given, "--out", str(out))


def environment() -> dict[str, str]:
    """Of a process that computes on the CPU."""
    more = {"PYTHONPATH": str(_TESTS.parent), "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    return os.environ | more


def start(*words: str, **more) -> subprocess.Popen:
    """Starts a program, its output on one pipe, on the CPU."""
    env = environment() | more.pop("env", {})
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **more
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str]:
    """Waits for a process: exit status and output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
