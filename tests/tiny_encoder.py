"""A network of a few hundred weights that stands in for the demo encoder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ur_jax.encoders import checkpoints
from ur_jax.encoders.networks.heads import MocoV2Head
from ur_jax.encoders.networks.layers import NormConfig
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.resnet import BasicBlock, ResNet
from ur_jax.encoders.zoo import ENCODERS

SIZE = (8, 8)


def network(folded, group_size=None):
    norm = NormConfig(group_size=group_size)
    backbone = ResNet((1,), BasicBlock, width=4, stem="cifar", folded=folded, norm=norm)
    return Network(backbone, MocoV2Head(6, 128))


SPEC = dataclasses.replace(ENCODERS["demo"], network=network, input_size=SIZE)


def stands_for_demo():
    """A `with` in which checkpoints of "demo" are of this network."""
    return ENCODERS.replaced("demo", SPEC)


def save(path) -> None:
    """Writes a checkpoint of random weights."""
    images = jnp.zeros((1, *SIZE, 3))
    variables = network(folded=False).init(jax.random.key(0), images)
    checkpoints.save_encoder(path, variables, {"encoder": "demo", "config": {}})


def save_images(folder, number: int) -> None:
    """Writes noise in two classes, cat and dog."""
    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / ("cat", "dog")[i % 2]
        path.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(100 * (i % 2), 100 * (i % 2) + 150, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i:02d}.png")
