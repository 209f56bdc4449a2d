"""A network of PyTorch that is bridged beside our own one of the same architecture.

    python -m ur_jax.performance.bridged                 # processor seconds here, by turns
    JAX_PLATFORMS=cpu python -m ur_jax.performance.bridged --compile-only h100

Of ResNet-50 and ViT-S/16 at 224 pixels with random weights: a forward pass and an attack. With
`--compile-only`, the bytes per image of their programs for a GPU that is not here, in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import ur_jax
from ur_jax import devices
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.jobs.label_free import EvaluationConfig
from ur_jax.performance import ahead
from ur_jax.performance.ahead import compiling
from ur_jax.performance.timing import Workload, time_by_turns

NETWORKS = ("resnet50", "mocov3")
SIZE = (224, 224)
_BATCH, _STEPS = 8, 2
_GPU_BATCH, _GPU_STEPS = 256, 10


def both(name: str, dtype: str = "float32") -> tuple[Encoder, Encoder]:
    """Our own network without weights, as shapes, and the bridged twin of PyTorch."""
    from ur_jax.encoders.bridge import from_torch
    from ur_jax.performance.torch_networks import make_network

    spec = ENCODERS[name]
    twin: Any = make_network(spec)
    bridged = from_torch(
        twin.network, input_size=SIZE, mean=spec.mean, std=spec.std, dtype=dtype, check=False
    )
    own = loading.abstract_encoder(name, "backbone", dtype=dtype)
    return own.replace(input_size=SIZE), bridged


def compiled(name: str, device: str) -> Iterator[tuple[str, float, float]]:
    """(function, MB per image of our own network, and of the bridged one), in bfloat16."""
    target = ahead.find(device)
    target = target._replace(devices=target.devices[:1])
    mesh = devices.data_mesh(target.devices)
    protocol = EvaluationConfig(read_at=(_GPU_STEPS - 1,))
    makers: tuple[Callable[[Encoder], Any], ...] = (
        lambda encoder: compiling.encoding(encoder, mesh, _GPU_BATCH),
        lambda encoder: compiling.attack(encoder, mesh, _GPU_BATCH, protocol),
    )
    encoders = both(name, "bfloat16")
    for make in makers:
        functions = [make(encoder) for encoder in encoders]
        own, bridged = (
            ahead.compile_function(encoder, function, target)
            for encoder, function in zip(encoders, functions)
        )
        yield own.function, own.bytes / 1e6, bridged.bytes / 1e6


def timed(name: str, repeats: int = 3) -> Iterator[tuple[str, float, float]]:
    """(function, processor seconds of our own network, and of the bridged one), least of turns."""
    abstract, bridged = both(name)
    random = np.random.default_rng(0)
    draw = lambda x: 0.02 * random.standard_normal(x.shape).astype(x.dtype)
    own = abstract.replace(params=jax.tree.map(draw, abstract.params))
    images = random.random((_BATCH, *SIZE, 3)).astype(np.float32)
    config = ur_jax.AttackConfig(num_steps=_STEPS)
    forward = jax.jit(lambda encoder, images: encoder(images))
    attack = lambda encoder: ur_jax.u_pgd(encoder, images, jax.random.key(0), config=config).images
    for what, run in (
        ("forward", lambda encoder: forward(encoder, images)),
        (f"U-PGD, {_STEPS} steps", attack),
    ):
        workloads = [
            Workload(kind, lambda run=run, e=encoder: jax.block_until_ready(run(e)), _BATCH, 0)
            for kind, encoder in (("own", own), ("bridged", bridged))
        ]
        first, second = time_by_turns(workloads, repeats)
        yield what, float(first.processor.min()), float(second.processor.min())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m ur_jax.performance.bridged", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--compile-only", metavar="GPU", help="h100, a100, h200, b200 or l4")
    given = parser.parse_args()
    unit = "MB per image" if given.compile_only else "processor seconds"
    for name in given.networks:
        found = compiled(name, given.compile_only) if given.compile_only else timed(name)
        for what, own, bridged in found:
            numbers = f"{own:.4g} and {bridged:.4g}, {bridged / own:.2f} times ours"
            print(f"{name}, {what}: {unit} {numbers}", flush=True)


if __name__ == "__main__":
    main()
