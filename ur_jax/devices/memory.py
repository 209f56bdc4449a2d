"""The batch size that a device's memory holds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ur_jax.errors import UserError
from ur_jax.types import Array, PyTree

_MEMORY_SHARE = 0.6
_LARGEST_BATCH = {"cpu": 64}  # a larger one leaves the cache and is slower
_DEFAULT_LARGEST_BATCH = 4096
# To read the memory off a program its kernels need not be tried: on a GPU that takes a minute.
_COMPILER_OPTIONS: dict[str, Any] = {"gpu": {"xla_gpu_autotune_level": 0}}


def fit_batch_size(
    fn: Callable[[PyTree, Array], PyTree],
    operand: PyTree,
    image_shape: tuple[int, int, int],
    *,
    largest: int | None = None,
    num_images: int | None = None,
    memory: int | None = None,
) -> int:
    """Chooses the images per device of a forward pass, an attack or the like from its memory.

    Compiles fn, reads the compiler's memory analysis, and halves the batch until arguments, outputs
    and temporaries take at most 60 % of the memory.

    Args:
      fn: (operand, images [B,H,W,C]) -> arrays, e.g. the encoder's call, or
        `lambda encoder, x: u_pgd(encoder, x, jax.random.key(0), config=config)`.
      operand: what fn needs besides, e.g. the encoder.
      image_shape: H, W, C.
      largest: batch size to begin with, a power of two; by default 64 on a CPU, else 4096.
      num_images: of a device; no batch beyond the next power of two is tried.
      memory: bytes of one device; by default what the device reports, on a CPU the machine's
        memory divided by its devices.

    Returns:
      A power of two, at least 1.

    Raises:
      ValueError: if one image is too much already.
    """
    device = jax.local_devices()[0]
    if largest is None:
        largest = _LARGEST_BATCH.get(device.platform, _DEFAULT_LARGEST_BATCH)
    if num_images is not None:
        largest = min(largest, 1 << (num_images - 1).bit_length())

    def compiled(size: int) -> Any:
        images = jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)
        lowered = jax.jit(fn).lower(operand, images)
        return lowered.compile(compiler_options=_COMPILER_OPTIONS.get(device.platform))

    return largest_batch(compiled, memory=memory or _device_memory(device), largest=largest)


def largest_batch(
    compile_batch: Callable[[int], Any], *, memory: int, largest: int = _DEFAULT_LARGEST_BATCH
) -> int:
    """Images per device of a program that takes at most 60 % of a memory, see `fit_batch_size`.

    Args:
      compile_batch: batch size -> the compiled program.
      memory: bytes of one device.
      largest: batch size to begin with, a power of two.

    Returns:
      A power of two, at least 1.

    Raises:
      ValueError: if one image is too much already.
    """
    bytes_needed, batch_size = 0, largest
    while batch_size >= 1:
        bytes_needed = needed(compile_batch(batch_size))
        if bytes_needed <= _MEMORY_SHARE * memory:
            return batch_size
        # Memory is about proportional to the batch: step to where it should fit.
        halvings = max(1, math.ceil(math.log2(bytes_needed / (_MEMORY_SHARE * memory))))
        batch_size = 1 if 1 < batch_size < 2**halvings else batch_size >> halvings
    raise UserError(
        f"Expected one image to fit into {memory / 2**30:.1f} GiB; the program takes "
        f"{bytes_needed / 2**30:.1f} GiB. Use a smaller encoder or bfloat16."
    )


def needed(compiled: Any) -> int:
    """Bytes of a device that a compiled program holds: arguments, outputs and temporaries."""
    analysis = compiled.memory_analysis()
    kinds = ("argument", "output", "temp")
    return sum(getattr(analysis, f"{kind}_size_in_bytes") for kind in kinds)


def _device_memory(device):
    """Bytes of memory of one device."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return physical // jax.local_device_count()
