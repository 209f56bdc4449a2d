"""Bytes and kernels of the programs for an H100 and a TPU v5e, by compilers that need neither.

The networks have the published widths and a few of their blocks, so that they compile in seconds. A
test is skipped where its compiler is not installed (`ur_jax[compile-gpu]`, `ur_jax[tpu]`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import ur_jax
from ur_jax import devices
from ur_jax.encoders.networks import resnet, vit
from ur_jax.jobs.label_free import EvaluationConfig
from ur_jax.performance import ahead
from ur_jax.performance.ahead import compiling

BATCH = 64
NETWORKS = {
    "resnet50": (resnet.ResNet((1, 1, 1, 1), resnet.Bottleneck, folded=True), (224, 244)),
    "mocov3": (vit.ViT(384, 2, 12, fixed_positions=True), (224, 224)),
    "mae": (vit.ViT(1024, 2, 16), (224, 224)),
}
# {jaxlib: {device: {network: MB and kernels of an image's pass, and, where it is compiled, of one
# of two steps of an attack}}}; the ViTs have the same blocks, of which one attack is enough.
RECORDED = {
    "0.10": {
        "h100": {
            "resnet50": (28.93, 38, 112.33, 269),
            "mocov3": (16.61, 30, 57.19, 260),
            "mae": (34.80, 30),
        }
    }
}
ALLOWED = 1.03


def measured(name: str, device: str) -> list[float]:
    network, size = NETWORKS[name]
    target = ahead.find(device)
    target = target._replace(devices=target.devices[:1])
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    encoder = ur_jax.from_fn(network.apply, variables, input_size=size, dtype="bfloat16")
    mesh = devices.data_mesh(target.devices)
    protocol = EvaluationConfig(read_at=(1,))
    found = []
    # As a user compiles: the tests' own strictness would be part of the programs.
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision(None):
        functions = [compiling.encoding(encoder, mesh, BATCH)]
        if name != "mae":
            functions.append(compiling.attack(encoder, mesh, BATCH, protocol))
        for function in functions:
            result = ahead.compile_function(encoder, function, target)
            found += [result.bytes / 1e6, sum(k.times for k in result.kernels)]
    return found


@pytest.mark.parametrize("device", ["h100", "v5e:2x2"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_and_kernels_stay_as_recorded(name, device):
    has_it = ahead.has_gpu_compiler() if device == "h100" else ahead.has_tpu_compiler()
    if not has_it:
        pytest.skip(f"the compiler for {device} is not installed")
    version = ".".join(jaxlib.__version__.split(".")[:2])
    found = measured(name, device)
    recorded = RECORDED.get(version, {}).get(device, {}).get(name)
    if recorded is None:
        pytest.skip(f"nothing is on record of jaxlib {version} for {device}; it gives {found}")
    assert all(new <= ALLOWED * old for new, old in zip(found, recorded, strict=True)), found
