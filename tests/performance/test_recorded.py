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

BATCH = 64
RESNET = resnet.ResNet((1, 1, 1, 1), resnet.Bottleneck, folded=True), (224, 244)
ONE_BOTTLENECK = resnet.ResNet((1,), resnet.Bottleneck, folded=True), (224, 244)
ONE_SMALL_BLOCK = vit.ViT(384, 1, 12, fixed_positions=True), (224, 224)
ONE_LARGE_BLOCK = vit.ViT(1024, 1, 16), (224, 224)
SMALL_VIT = vit.ViT(384, 2, 12, fixed_positions=True), (224, 224)
LARGE_VIT = vit.ViT(1024, 2, 16), (224, 224)
# {(device, published network, what is compiled of it): network}. Compiling for a TPU takes long, so
# that there a gradient stands for its forward pass too; the one attack has the loop.
PROGRAMS = {
    ("h100", "resnet50", "forward"): RESNET,
    ("h100", "resnet50", "attack"): RESNET,
    ("h100", "resnet50", "float samples"): RESNET,
    ("h100", "resnet50", "grid samples"): RESNET,
    ("h100", "mocov3", "forward"): SMALL_VIT,
    ("h100", "mocov3", "gradient"): SMALL_VIT,
    ("h100", "mae", "forward"): LARGE_VIT,
    ("v5e:2x2", "resnet50", "gradient"): ONE_BOTTLENECK,
    ("v5e:2x2", "mocov3", "gradient"): ONE_SMALL_BLOCK,
    ("v5e:2x2", "mae", "forward"): ONE_LARGE_BLOCK,
}
# {jaxlib: {device: {(network, function): MB and kernels, of an image or of a step of an attack}}}
RECORDED = {
    "0.10": {
        "h100": {
            ("resnet50", "forward"): (26.61, 38),
            ("resnet50", "attack"): (100.01, 261),
            ("resnet50", "float samples"): (25.75, 74),
            ("resnet50", "grid samples"): (28.40, 110),
            ("mocov3", "forward"): (16.61, 30),
            ("mocov3", "gradient"): (38.43, 65),
            ("mae", "forward"): (34.80, 30),
        },
        "v5e:2x2": {
            ("resnet50", "gradient"): (26.24, 33),
            ("mocov3", "gradient"): (4.31, 100),
            ("mae", "forward"): (4.29, 58),
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


def function_of(encoder, what, mesh):
    """What is compiled: a forward pass, a gradient, an attack or a sampling loop of two steps."""
    forward = compiling.encoding(encoder, mesh, BATCH)
    if what == "forward":
        return forward
    if what == "attack":
        return compiling.attack(encoder, mesh, BATCH, EvaluationConfig(read_at=(1,)))
    abstract, images = forward.arguments
    if what.endswith("samples"):
        everywhere = jax.tree.leaves(abstract)[0].sharding
        known = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
        run = functools.partial(
            sample_outputs, distances, n=2 * BATCH, sigma=0.25, clip=False, mesh=mesh,
            batch_size=BATCH, noise=what.split()[0],
        )  # fmt: skip
        center, image = jnp.zeros(encoder.dimension), jnp.zeros(images.shape[1:])
        rest = jax.eval_shape(lambda: (center, image, jax.random.key(0), jnp.int32(0)))
        center, image, key, index = jax.tree.map(known, rest)
        arguments = ((abstract, center), image, key, index, index)
        return forward._replace(fn=run, arguments=arguments, items=2 * BATCH)
    clean = jax.ShapeDtypeStruct((BATCH, encoder.dimension), jnp.float32, sharding=images.sharding)
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
        function = function_of(encoder, what, devices.data_mesh(target.devices))
        result = ahead.compile_function(encoder, function, target)
    return result.bytes / 1e6, sum(kernel.times for kernel in result.kernels)


@pytest.mark.parametrize(("device", "name", "what"), PROGRAMS)
def test_bytes_and_kernels_stay_as_recorded(device, name, what):
    has_it = ahead.has_gpu_compiler() if device == "h100" else ahead.has_tpu_compiler()
    if not has_it:
        pytest.skip(f"the compiler for {device} is not installed")
    version = ".".join(jaxlib.__version__.split(".")[:2])
    recorded = RECORDED.get(version, {}).get(device, {}).get((name, what))
    if recorded is None:
        pytest.skip(f"nothing is on record of jaxlib {version} for {device}")
    found = measured(device, what, *PROGRAMS[device, name, what])
    assert all(new <= ALLOWED * old for new, old in zip(found, recorded, strict=True)), found


if __name__ == "__main__":  # what to record; or [DEVICE NETWORK FUNCTION], of any function
    for device, name, what in [tuple(sys.argv[1:])] if sys.argv[1:] else PROGRAMS:
        of = next(PROGRAMS[key] for key in PROGRAMS if key[:2] == (device, name))
        print(device, name, what, measured(device, what, *of), flush=True)
