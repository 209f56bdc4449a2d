"""Compiles the benchmark's hot functions for devices that are not here; says what they do there.

It tells before a job is queued whether the functions compile, fit a device's memory, communicate
where they should not, and what limits their speed.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ur_jax import devices
from ur_jax.attacks import u_pgd
from ur_jax.certify import CenterConfig
from ur_jax.certify.sampling import sample_outputs
from ur_jax.devices import memory
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.jobs.label_free import EvaluationConfig
from ur_jax.metrics import ranks
from ur_jax.performance.ahead.programs import Kernel, collectives, kernels
from ur_jax.performance.ahead.targets import Target, find
from ur_jax.types import Array, PyTree


class Function(NamedTuple):
    """What is compiled.

    Attributes:
      title: for tables.
      fn: a pure function.
      arguments: of it; abstract arrays with shardings.
      items: what a call does on all devices, in the unit.
      unit: "image", "step" of an attack on an image, "sample" or "row".
    """

    title: str
    fn: Callable[..., Any]
    arguments: tuple[Any, ...]
    items: int
    unit: str


class Compiled(NamedTuple):
    """What the compiler says of one function.

    Attributes:
      encoder: its name.
      dtype: its compute dtype.
      function: what was compiled.
      unit: of what is counted: an image, a step of an attack on an image, a noisy sample, a row.
      items: of a call, on all devices.
      kernels: of one device's program.
      flops: operations of products, per item; what is in a loop counts as often as it turns.
      bytes: to and from memory, per item, likewise.
      rate: items per second of all devices at most, by the roofline of each kernel; None if the
        device's rates are not known.
      memory: bytes of a device for arguments, outputs and temporaries.
      available: bytes of a device that a program may use; None if not known.
      inner: {collective: number} inside loops.
      outer: {collective: number} outside of them.
      seconds: that compiling took.
    """

    encoder: str
    dtype: str
    function: str
    unit: str
    items: int
    kernels: list[Kernel]
    flops: float
    bytes: float
    rate: float | None
    memory: int
    available: int | None
    inner: dict[str, int]
    outer: dict[str, int]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether it fits a device, and whether loops are free of collectives."""
        return not self.inner and (self.available is None or self.memory <= self.available)


def compile_encoder(
    name: str,
    target: Target | str,
    *,
    protocol: EvaluationConfig,
    center: CenterConfig,
    dtype: str = "float32",
    samples_per_device: int = 64,
    bank_size: int = 4096,
    on_progress: Callable[[str], Any] = lambda text: None,
) -> Iterator[Compiled]:
    """Compiles encoding, attacks, neighbours and certificates of an encoder at its full size.

    Batches are those of the protocol on each host, so every device has `protocol.batch_size` images
    over the devices of a host; without a batch size it is what a job would find there.

    Args:
      name: the encoder, see `list_encoders`, whose weights are not needed; or what `load_encoder`
        takes.
      target: see `find`.
      protocol: of attacks and neighbours.
      center: of certificates.
      dtype: compute dtype.
      samples_per_device: of a certificate, in one forward pass; if the protocol has a batch size.
      bank_size: rows of a block of the bank, for neighbours, on a host's devices.
      on_progress: told what is compiled.

    Yields:
      One result per function.
    """
    target = find(target) if isinstance(target, str) else target
    mesh = devices.data_mesh(target.devices)
    encoder = loading.abstract_encoder(name, "paper", dtype)
    if protocol.batch_size is None:
        on_progress(f"{name}: the largest batch ...")
        per_device = samples_per_device = _largest_batch(encoder, target, protocol)
        on_progress(f"  {per_device} images per device")
    else:
        per_device = max(1, protocol.batch_size * target.num_hosts // mesh.size)
    functions = [
        encoding(encoder, mesh, per_device),
        attack(encoder, mesh, per_device, protocol),
        attack(encoder, mesh, per_device, protocol, targeted=True),
        sampling(encoder, mesh, samples_per_device, center),
        neighbours(encoder, mesh, bank_size * target.num_hosts, protocol.num_images),
    ]
    for function in functions:
        on_progress(f"{name}: {function.title} ...")
        yield compile_function(encoder, function, target)


def encoding(encoder: Encoder, mesh: Mesh, per_device: int) -> Function:
    """Representations of a batch."""
    everywhere, divided = _places(mesh)
    count = per_device * mesh.size
    images = _abstract((count, *encoder.input_size, 3), divided)
    return Function(
        "representations", _represent, (_put(encoder, everywhere), images), count, "image"
    )


def attack(
    encoder: Encoder,
    mesh: Mesh,
    per_device: int,
    protocol: EvaluationConfig,
    targeted: bool = False,
) -> Function:
    """An attack on a batch, as long as the protocol's; its clean and last pass are shared by all
    its steps."""
    everywhere, divided = _places(mesh)
    num_steps, count = max(protocol.read_at) + 1, per_device * mesh.size
    config = protocol.attack(protocol.eps[0], num_steps)

    def run(encoder, images, keys, target=None):
        return u_pgd(encoder, images, keys, config=config, target=target)

    keys = _put(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)), divided)
    images = _abstract((count, *encoder.input_size, 3), divided)
    arguments = (_put(encoder, everywhere), images, keys)
    title = f"U-PGD, {num_steps} steps"
    if targeted:
        arguments = (*arguments, _abstract((count, encoder.dimension), divided))
        title = f"targeted {title}"
    return Function(title, run, arguments, count * num_steps, "step")


def sampling(encoder: Encoder, mesh: Mesh, per_device: int, center: CenterConfig) -> Function:
    """The noisy samples of one image's certificate."""
    everywhere, _ = _places(mesh)
    number = center.n0 + center.n
    run = functools.partial(
        sample_outputs, _represent, n=number, sigma=center.sigma, clip=center.clip, mesh=mesh,
        batch_size=per_device,
    )  # fmt: skip
    image = _abstract((*encoder.input_size, 3), everywhere)
    key, index = _put((_key(), jax.ShapeDtypeStruct((), jnp.int32)), everywhere)
    arguments = (_put(encoder, everywhere), image, key, index, index)
    drawn = math.ceil(number / (per_device * mesh.size)) * per_device * mesh.size
    return Function(f"certificate, {number} samples", run, arguments, drawn, "sample")


def neighbours(encoder: Encoder, mesh: Mesh, rows: int, queries: int) -> Function:
    """Ranks of attacked images among one block of a bank."""
    everywhere, divided = _places(mesh)
    asked = (_abstract((queries, encoder.dimension), everywhere),) * 2
    bank = _abstract((rows, encoder.dimension), divided)
    run = functools.partial(_count_block, mesh)
    return Function("neighbours, one block", run, (asked, bank), rows, "row")


def compile_function(encoder: Encoder, function: Function, target: Target) -> Compiled:
    """Compiles one function and reads what the compiler says."""
    start = time.monotonic()
    compiled = _compile(function, target)
    seconds = time.monotonic() - start
    text = compiled.as_text() or ""
    inner, outer = collectives(text)
    found = kernels(text)
    share = len(target.devices) / function.items  # the program is one device's
    rate = None
    if target.chip is not None:
        spent = sum(k.times * target.chip.seconds(k.bytes, k.flops, encoder.dtype) for k in found)
        rate = function.items / spent if spent else None
    return Compiled(
        encoder=encoder.name,
        dtype=encoder.dtype,
        function=function.title,
        unit=function.unit,
        items=function.items,
        kernels=found,
        flops=share * sum(k.times * k.flops for k in found),
        bytes=share * sum(k.times * k.bytes for k in found),
        rate=rate,
        memory=memory.needed(compiled),
        available=target.memory,
        inner=inner,
        outer=outer,
        seconds=seconds,
    )


def _compile(function: Function, target: Target) -> Any:
    """The compiled function."""
    lowered = jax.jit(function.fn).lower(*function.arguments)
    return lowered.compile(compiler_options=target.options or None)


def _largest_batch(encoder: Encoder, target: Target, protocol: EvaluationConfig) -> int:
    """Images of a device that an attack has room for, by the rule by which a job finds it there."""
    mesh = devices.data_mesh(target.devices[:1])
    short = protocol.attack(max(protocol.eps), 2)  # its memory does not grow with its steps
    everywhere, divided = _places(mesh)

    def compile_batch(size: int) -> Any:
        images = _abstract((size, *encoder.input_size, 3), divided)
        run = lambda encoder, images: u_pgd(encoder, images, jax.random.key(0), config=short)
        function = Function("", run, (_put(encoder, everywhere), images), size, "image")
        return _compile(function, target)

    share = math.ceil(protocol.num_images / len(target.devices))
    return min(share, memory.largest_batch(compile_batch, memory=target.memory or 16 * 2**30))


def _represent(encoder: Encoder, images: Array) -> Array:
    """The encoder, as a function that stays the same object."""
    return encoder(images)


def _count_block(mesh: Mesh, queries: tuple[Array, Array], block: Array) -> PyTree:
    """One block of the bank on a fresh count of neighbours."""
    attacked, clean = queries
    number = attacked.shape[0]
    zeros = jnp.zeros((mesh.size, number), jnp.int32)
    counts = ranks._Counts(zeros, zeros, jnp.zeros(mesh.size, jnp.int32))
    asked = ranks._Queries(attacked, clean, jnp.arange(number, dtype=jnp.int32))
    indices = jnp.arange(block.shape[0], dtype=jnp.int32)
    mask = jnp.ones(block.shape[0], bool)
    return ranks._count_block(counts, asked, block, indices, mask, divergence="l2", mesh=mesh)


def _places(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """On every device, and divided over them."""
    on = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    return on(), on(devices.DATA_AXIS)


def _put(tree: PyTree, where: NamedSharding) -> PyTree:
    """Shapes with a sharding."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, tree)


def _abstract(shape: tuple[int, ...], where: NamedSharding) -> jax.ShapeDtypeStruct:
    """A float32 array that is not there."""
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)


def _key() -> jax.ShapeDtypeStruct:
    """The shape of a key."""
    return jax.eval_shape(lambda: jax.random.key(0))
