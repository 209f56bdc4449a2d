"""How fast networks that are not ours are attacked, beside a host loop over one jitted step.

    python -m ur_jax.performance.own

XLA's CPU compiler has its fast kernels outside of loops only, which a loop on the host is; what
`encoders.networks.rewritten` does for the attack's own loop shows in the ratio, which is that of
processor seconds, by turns.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ur_jax
from ur_jax.encoders.base import Encoder
from ur_jax.performance.timing import Workload, time_by_turns
from ur_jax.types import Array

WIDTHS = ((32, 1), (64, 2), (64, 1), (128, 2))
"""Features and strides of the small networks' 3x3 convolutions."""


class Linen(nn.Module):
    """Convolutions, ReLUs and an average, of flax.linen."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for features, stride in WIDTHS:
            x = nn.relu(nn.Conv(features, (3, 3), (stride, stride))(x))
        return nn.Dense(64)(x.mean((1, 2)))


class Nnx(nnx.Module):
    """The same, of flax.nnx."""

    def __init__(self, rngs: nnx.Rngs):
        inputs = (3, *(features for features, _ in WIDTHS))
        self.convs = nnx.List(
            nnx.Conv(width, features, (3, 3), (stride, stride), rngs=rngs)
            for width, (features, stride) in zip(inputs, WIDTHS, strict=False)
        )
        self.dense = nnx.Linear(WIDTHS[-1][0], 64, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for conv in self.convs:
            x = nnx.relu(conv(x))
        return self.dense(x.mean((1, 2)))


def linen() -> Encoder:
    """An encoder of `Linen`."""
    module = Linen()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return ur_jax.from_linen(module, variables, input_size=(32, 32))


def from_nnx() -> Encoder:
    """An encoder of `Nnx`."""
    return ur_jax.from_nnx(Nnx(nnx.Rngs(0)), input_size=(32, 32))


def resnet18() -> Encoder:
    """PyTorch's ResNet-18 at 64 pixels, exported."""
    from ur_jax.encoders.bridge import from_torch
    from ur_jax.performance.torch_networks import resnet18 as network

    return from_torch(network(), input_size=(64, 64))


NETWORKS: Mapping[str, Callable[[], Encoder]] = {
    "flax.linen": linen,
    "flax.nnx": from_nnx,
    "ResNet-18 of PyTorch": resnet18,
}


@jax.jit
def _step(encoder: Encoder, attacked: Array, images: Array, clean: Array) -> Array:
    """One step, as a loop on the host calls it."""
    away = lambda attacked: jnp.sum((encoder(attacked) - clean) ** 2)
    moved = attacked + 0.001 * jnp.sign(jax.grad(away)(attacked))
    return jnp.clip(jnp.clip(moved, images - 0.05, images + 0.05), 0.0, 1.0)


@jax.jit
def _encode(encoder: Encoder, images: Array) -> Array:
    """Representations."""
    return encoder(images)


def ratio(encoder: Encoder, num_steps: int = 6, batch_size: int = 8, repeats: int = 3) -> float:
    """Processor seconds of the host's loop over those of `u_pgd`, the median turn by turn.

    Args:
      encoder: what is attacked.
      num_steps: of both.
      batch_size: images of noise.
      repeats: turns.
    """
    shape = (batch_size, *encoder.input_size, 3)
    images = jax.random.uniform(jax.random.key(1), shape)
    keys = jax.random.split(jax.random.key(2), batch_size)
    config = ur_jax.AttackConfig(num_steps=num_steps)

    def host() -> None:
        clean, attacked = _encode(encoder, images), jnp.clip(images + 0.01, 0.0, 1.0)
        for _ in range(num_steps):
            attacked = _step(encoder, attacked, images, clean)
        jax.block_until_ready(_encode(encoder, attacked))

    def ours() -> None:
        jax.block_until_ready(ur_jax.u_pgd(encoder, images, keys, config=config).images)

    workloads = [Workload(name, run, 1, 0) for name, run in (("ours", ours), ("host", host))]
    own, other = time_by_turns(workloads, repeats)
    return float(np.median(other.processor / own.processor))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ur_jax.performance.own", description=__doc__)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    for name in parser.parse_args().networks:
        measured = functools.partial(ratio, NETWORKS[name]())
        print(f"{name}: {measured():.2f} of a host loop over one jitted step", flush=True)


if __name__ == "__main__":
    main()
