"""Our networks, their twins in PyTorch and the bridged twins give one representation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import reference_rules

from ur_jax.encoders import loading, mapping
from ur_jax.encoders.bridge import from_torch
from ur_jax.encoders.networks import heads
from ur_jax.encoders.networks.heads import NoHead
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.vit import ViT
from ur_jax.encoders.zoo import ENCODERS

torch = pytest.importorskip("torch")
NORM = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize("name", ["resnet50", "mae", "mocov3"])
def test_ours_the_twin_and_the_bridged_twin_agree(name):
    from ur_jax.performance import torch_networks

    spec = ENCODERS[name]
    if name == "resnet50":  # the whole one, on a small image
        spec = dataclasses.replace(spec, input_size=(64, 64))
    elif name == "mae":  # in miniature
        spec = dataclasses.replace(spec, network=lambda folded: Network(ViT(16, 2, 4), NoHead()))
    else:
        projector = lambda folded: heads.mocov3_projector(32, 16, folded=folded)
        network = lambda folded: Network(ViT(16, 2, 2), projector(folded))
        spec = dataclasses.replace(spec, network=network, parts=())
    twin: Any = torch_networks.make_network(spec)
    state = {
        key: reference_rules.fill(key, tuple(tensor.shape), str(tensor.dtype).split(".")[-1])
        for key, tensor in twin.network.state_dict().items()
    }
    twin.network.load_state_dict({key: torch.from_numpy(t) for key, t in state.items()})
    if name == "resnet50":
        state |= {"fc.weight": np.zeros((1000, 2048), "f4"), "fc.bias": np.zeros(1000, "f4")}
    if name == "mocov3":  # its file has the projector, too
        sizes = {"head.0.weight": (32, 16), "head.3.weight": (32, 32), "head.6.weight": (16, 32)}
        for norm, width in (("head.1", 32), ("head.4", 32), ("head.7", 16)):
            last = ("running_mean", "running_var") if width == 16 else NORM
            sizes |= {f"{norm}.{part}": (width,) for part in last}
        state |= {key: reference_rules.fill(key, size) for key, size in sizes.items()}
    state = {f"{spec.prefix}{key}": tensor for key, tensor in state.items()}
    published = mapping.map_tensors(state, spec)
    ours = loading.make_encoder(spec, published.variables, published.config, "backbone")
    images = reference_rules.images(*spec.input_size)
    with torch.no_grad():
        theirs = twin(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    bridged = from_torch(
        twin.network, input_size=spec.input_size, mean=spec.mean, std=spec.std, check=False
    )
    represent = jax.jit(lambda encoder, images: encoder(images))
    for encoder in (ours, bridged):
        found = np.asarray(represent(encoder, images))
        assert np.abs(found - theirs).max() <= 2e-5 * np.abs(theirs).max()
