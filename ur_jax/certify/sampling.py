"""Noisy samples of images, divided over the devices: the engine under every certificate.

**Noise.** Sample i of image j is image + sigma * z with z drawn from the key
fold_in(fold_in(key, j), i); float32 normals, or the integers of `noise`, which are sound. No device
count, batch size, slot or interruption enters, so none of them changes a bit of the noise.

**`sample_outputs`** evaluates a fixed number of samples of one image. Each device loops over its
own share; there is no collective at all. `sequential` draws as many as a test needs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ur_jax.certify.noise import grid_noise, grid_samples
from ur_jax.devices import DATA_AXIS
from ur_jax.types import Array, Key, PyTree


def noisy_samples(
    images: Array,
    key: Key,
    indices: Array,
    samples: Array,
    *,
    sigma: float,
    clip: bool,
    noise: str = "float",
) -> Array:
    """Draws one noisy sample of each image, images + sigma * normal.

    Args:
      images: [B,H,W,C] float32 in [0,1].
      key: key of the run.
      indices: [B] integer, the index of each image.
      samples: [B] integer, the index of each sample.
      sigma: standard deviation, in pixel units.
      clip: whether to clip the result to [0,1].
      noise: "float", or "grid", which always clips.

    Returns:
      [B,H,W,C] float32. Row b depends on its own image, index and sample index alone.
    """

    def own_key(index, sample):
        return jax.random.fold_in(jax.random.fold_in(key, index), sample)

    if noise == "grid":
        return grid_samples(images, jax.vmap(own_key)(indices, samples), grid_noise(sigma))

    def draw(index, sample):
        return jax.random.normal(own_key(index, sample), images.shape[1:], images.dtype)

    # The clip changes no number: it stands between product and sum, so that no compiler makes one
    # rounding of the two in one program and two in another. A barrier did not prevent it on CPUs.
    noisy = images + jnp.clip(sigma * jax.vmap(draw)(indices, samples), -1e30, 1e30)
    return jnp.clip(noisy, 0.0, 1.0) if clip else noisy


@functools.partial(
    jax.jit, static_argnames=("fn", "n", "sigma", "clip", "mesh", "batch_size", "noise")
)
def sample_outputs(
    fn: Callable[[PyTree, Array], PyTree],
    operand: PyTree,
    image: Array,
    key: Key,
    index: Array,
    first: Array,
    *,
    n: int,
    sigma: float,
    clip: bool,
    mesh: Mesh,
    batch_size: int,
    noise: str = "float",
) -> PyTree:
    """Evaluates fn on samples first, ..., first + n - 1 of one image.

    Args:
      fn: (operand, noisy images [B,H,W,C]) -> arrays with leading axis B; static, so pass the same
        function object every time.
      operand: what fn needs besides, e.g. the encoder; replicated.
      image: [H,W,C] float32.
      key: key of the run.
      index: index of the image, integer scalar.
      first: index of the first sample, integer scalar.
      n: number of samples.
      sigma: standard deviation of the noise, in pixel units.
      clip: whether noisy images are clipped to [0,1].
      mesh: mesh of `ur_jax.devices.data_mesh`.
      batch_size: samples per device and forward pass.
      noise: "float" or "grid", see `noisy_samples`.

    Returns:
      The outputs in the order of the samples, leading axis n.
    """
    num_batches = math.ceil(n / (mesh.size * batch_size))

    def share(operand, image, key, index, first):
        start = first + jax.lax.axis_index(DATA_AXIS) * num_batches * batch_size

        def batch(b):
            samples = start + b * batch_size + jnp.arange(batch_size)
            images = jnp.broadcast_to(image, (batch_size, *image.shape))
            indices = jnp.full(batch_size, index)
            noisy = noisy_samples(
                images, key, indices, samples, sigma=sigma, clip=clip, noise=noise
            )
            return fn(operand, noisy)

        outputs = jax.lax.map(batch, jnp.arange(num_batches))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    # Replication is not checked: a user's network may start a scan from constants.
    outputs = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(DATA_AXIS),
        check_vma=False,
    )(operand, image, key, index, first)
    return jax.tree.map(lambda x: x[:n], outputs)
