"""Bytes and kernels of the programs for an H100 and a TPU v5e, by compilers that need neither.

The networks have the published widths and a few of their blocks, so that they compile in seconds. A
test is skipped where its compiler is not installed (`ur_jax[compile-gpu]`, `ur_jax[tpu]`).
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import ur_jax
from ur_jax import devices
from ur_jax.certify.sampling import sample_outputs
from ur_jax.encoders.networks import resnet, vit
from ur_jax.jobs.label_free import EvaluationConfig
from ur_jax.performance import ahead
from ur_jax.performance.ahead import compiling

pytestmark = pytest.mark.usefixtures("optimised")

BATCH = {"h100": 64, "v5e:2x2": 8}  # at which a TPU's ViT compiles in half the time
# {device: {published network: one of its widths and some of its blocks, size of images}}
NETWORKS = {
    "h100": {
        "resnet50": (resnet.ResNet((1, 1, 1, 1), resnet.Bottleneck, folded=True), (224, 244)),
        "mocov3": (vit.ViT(384, 2, 12, fixed_positions=True), (224, 224)),
        "mae": (vit.ViT(1024, 2, 16), (224, 224)),
    },
    "v5e:2x2": {
        "resnet50": (resnet.ResNet((1,), resnet.Bottleneck, folded=True), (224, 244)),
        "mocov3": (vit.ViT(384, 1, 12, fixed_positions=True), (224, 224)),
        "mae": (vit.ViT(1024, 1, 16), (224, 224)),
    },
}
# {jaxlib: {device: {(network, function): MB and kernels, of an image or of a step of an attack}}}.
# A gradient stands for its forward pass too, of which on the GPU each kind of network has one
# besides; the one attack has the loop.
RECORDED = {
    "0.10": {
        "h100": {
            ("resnet50", "forward"): (26.61, 38),
            ("resnet50", "attack"): (100.01, 261),
            ("resnet50", "float samples"): (25.75, 74),
            ("resnet50", "grid samples"): (28.40, 110),
            ("mocov3", "gradient"): (38.43, 65),
            ("mae", "forward"): (34.80, 30),
        },
        "v5e:2x2": {
            ("resnet50", "gradient"): (5.50, 40),
            ("mocov3", "gradient"): (2.49, 102),
        },
    }
}
ALLOWED = 1.03


def gradient(encoder, images, clean):
    """A step against the representations, as an attack has it in its loop."""
    away = lambda images: jnp.sum((encoder(images) - clean) ** 2)
    return images + 0.01 * jnp.sign(jax.grad(away)(images))


def distances(operand, images):
    """What the sampling loop of a certificate computes: distances to a center."""
    encoder, center = operand
    return jnp.linalg.norm(encoder(images) - center, axis=-1)


def function_of(encoder, what, mesh, batch):
    """What is compiled: a forward pass, a gradient, an attack or a sampling loop of two steps."""
    forward = compiling.encoding(encoder, mesh, batch)
    if what == "forward":
        return forward
    if what == "attack":
        return compiling.attack(encoder, mesh, batch, EvaluationConfig(read_at=(1,)))
    abstract, images = forward.arguments
    if what.endswith("samples"):
        everywhere = jax.tree.leaves(abstract)[0].sharding
        known = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
        run = functools.partial(
            sample_outputs, distances, n=2 * batch, sigma=0.25, clip=False, mesh=mesh,
            batch_size=batch, noise=what.split()[0],
        )  # fmt: skip
        center, image = jnp.zeros(encoder.dimension), jnp.zeros(images.shape[1:])
        rest = jax.eval_shape(lambda: (center, image, jax.random.key(0), jnp.int32(0)))
        center, image, key, index = jax.tree.map(known, rest)
        arguments = ((abstract, center), image, key, index, index)
        return forward._replace(fn=run, arguments=arguments, items=2 * batch)
    clean = jax.ShapeDtypeStruct((batch, encoder.dimension), jnp.float32, sharding=images.sharding)
    return forward._replace(fn=gradient, arguments=(abstract, images, clean))


def measured(device, what, network, size):
    """MB and kernels."""
    target = ahead.find(device)
    target = target._replace(devices=target.devices[:1])
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    encoder = ur_jax.from_fn(network.apply, variables, input_size=size, dtype="bfloat16")
    # As a user compiles: the tests' own strictness would be part of the programs.
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision(None):
        function = function_of(encoder, what, devices.data_mesh(target.devices), BATCH[device])
        result = ahead.compile_function(encoder, function, target)
    return result.bytes / 1e6, sum(kernel.times for kernel in result.kernels)


PROGRAMS = [
    (device, *program) for device, programs in RECORDED["0.10"].items() for program in programs
]


@pytest.mark.parametrize(("device", "name", "what"), PROGRAMS)
def test_bytes_and_kernels_stay_as_recorded(device, name, what):
    has_it = ahead.has_gpu_compiler() if device == "h100" else ahead.has_tpu_compiler()
    if not has_it:
        pytest.skip(f"the compiler for {device} is not installed")
    version = ".".join(jaxlib.__version__.split(".")[:2])
    recorded = RECORDED.get(version, {}).get(device, {}).get((name, what))
    if recorded is None:
        pytest.skip(f"nothing is on record of jaxlib {version} for {device}")
    found = measured(device, what, *NETWORKS[device][name])
    assert all(new <= ALLOWED * old for new, old in zip(found, recorded, strict=True)), found


if __name__ == "__main__":  # what to record; or [DEVICE NETWORK FUNCTION], of any function
    for device, name, what in [tuple(sys.argv[1:])] if sys.argv[1:] else PROGRAMS:
        print(device, name, what, measured(device, what, *NETWORKS[device][name]), flush=True)
