"""Compiles the benchmark's hot functions for a TPU topology on a machine without a TPU.

It tells before a job is queued whether the functions compile, fit a chip's memory, and communicate
where they should not. It needs libtpu (the extra `tpu`) and nothing of a TPU.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import box
from rich.table import Table

from ur_jax import devices
from ur_jax.attacks import u_pgd
from ur_jax.certify import CenterConfig
from ur_jax.certify.sampling import sample_outputs
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.errors import UserError
from ur_jax.jobs.label_free import EvaluationConfig
from ur_jax.metrics import ranks
from ur_jax.types import Array, PyTree

_COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"),
    "collective-broadcast",
)
_CALLS = "body|condition|calls|to_apply|branch_computations|true_computation|false_computation"
# Bytes of memory of a chip's device as JAX counts them (a core of v2 and v3, a chip since v4).
_GIB = 2**30
_MEMORY = {
    "TPU v2": 8 * _GIB,
    "TPU v3": 16 * _GIB,
    "TPU v4": 32 * _GIB,
    "TPU v5 lite": 16 * _GIB,
    "TPU v5": 95 * _GIB,
    "TPU v6 lite": 32 * _GIB,
}
_SEPARATE_CORES = ("TPU v2", "TPU v3")  # later chips with two cores run them as one device
# What libtpu asks for on a machine without a TPU; any accelerator type will do.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Compiled(NamedTuple):
    """What the compiler says of one function.

    Attributes:
      encoder: its name.
      function: what was compiled.
      images: images on all chips at a time: of a call, or of one turn of a certificate's loop.
      flops: floating-point operations per image. The body of a loop counts once, so that of an
        attack it is the clean image and one step.
      bytes: bytes moved per image, likewise.
      memory: bytes of a chip for arguments, outputs and temporaries.
      available: bytes that a chip has; None if not known.
      inner: {collective: number} inside loops.
      outer: {collective: number} outside of them.
      seconds: that compiling took.
    """

    encoder: str
    function: str
    images: int
    flops: float
    bytes: float
    memory: int
    available: int | None
    inner: dict[str, int]
    outer: dict[str, int]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether it fits a chip, and whether loops are free of collectives."""
        return not self.inner and (self.available is None or self.memory <= self.available)


def topology_devices(topology: str) -> list[Any]:
    """The devices of a TPU topology such as "v5e:16x16", on any machine.

    Raises:
      ValueError: for an unknown topology, or without libtpu.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        chips = topologies.get_topology_desc(topology, "tpu").devices
        kind = chips[0].device_kind
        if any(chip.core_on_chip for chip in chips) and kind not in _SEPARATE_CORES:
            described = topologies.get_topology_desc(topology, "tpu", chip_config_name="megacore")
            chips = described.devices
        return list(chips)
    except Exception as error:  # libtpu and XLA have no common class for it
        raise UserError(
            f"Expected a TPU topology such as v5e:16x16, v4:2x2x2 or v6e:4x4, and libtpu "
            f'(pip install "jax[tpu]"); {topology!r} gave: {error}'
        ) from error


def compile_encoder(
    name: str,
    topology: str,
    *,
    protocol: EvaluationConfig,
    center: CenterConfig,
    dtype: str = "float32",
    samples_per_chip: int = 64,
    bank_size: int = 4096,
    on_progress: Callable[[str], Any] = lambda text: None,
) -> Iterator[Compiled]:
    """Compiles encoding, attacks, neighbours and certificates of an encoder at its full size.

    Batches are those of the protocol on each host, so every chip has `protocol.batch_size` images
    over the chips of a host.

    Args:
      name: the encoder, see `list_encoders`, whose weights are not needed; or what `load_encoder`
        takes.
      topology: see `topology_devices`.
      protocol: of attacks and neighbours.
      center: of certificates.
      dtype: compute dtype.
      samples_per_chip: of a certificate, in one forward pass.
      bank_size: rows of a block of the bank, for neighbours, on a host's chips.
      on_progress: told what is compiled.

    Yields:
      One result per function.
    """
    chips = topology_devices(topology)
    mesh = devices.data_mesh(chips)
    num_hosts = len({chip.process_index for chip in chips})
    batch_size = protocol.batch_size or EvaluationConfig.batch_size or 64
    num_images = max(1, batch_size * num_hosts // mesh.size) * mesh.size
    encoder = loading.abstract_encoder(name, "paper", dtype)
    everywhere = NamedSharding(mesh, PartitionSpec())
    divided = NamedSharding(mesh, PartitionSpec(devices.DATA_AXIS))
    encoder = _placed(encoder, everywhere)
    shape = (*encoder.input_size, 3)
    images = _placed(jax.ShapeDtypeStruct((num_images, *shape), jnp.float32), divided)
    keys = _placed(jax.eval_shape(lambda k: jax.random.split(k, num_images), _key()), divided)
    targets = jax.ShapeDtypeStruct((num_images, encoder.dimension), jnp.float32)
    targets = _placed(targets, divided)
    num_steps = max(protocol.read_at) + 1
    attack = protocol.attack(protocol.eps[0], num_steps)

    def untargeted(encoder, images, keys):
        return u_pgd(encoder, images, keys, config=attack)

    def targeted(encoder, images, keys, target):
        return u_pgd(encoder, images, keys, config=attack, target=target)

    rows = bank_size * num_hosts
    matrix = lambda size: jax.ShapeDtypeStruct((size, encoder.dimension), jnp.float32)
    one_image = _placed(jax.ShapeDtypeStruct(shape, jnp.float32), everywhere)
    key, number = _placed((_key(), jax.ShapeDtypeStruct((), jnp.int32)), everywhere)
    num_samples = center.n0 + center.n
    sample = functools.partial(
        sample_outputs, _represent, n=num_samples, sigma=center.sigma, clip=center.clip, mesh=mesh,
        batch_size=samples_per_chip,
    )  # fmt: skip
    todo = (
        ("representations", _represent, (encoder, images), num_images),
        (f"U-PGD, {num_steps} steps", untargeted, (encoder, images, keys), num_images),
        (
            f"targeted U-PGD, {num_steps} steps",
            targeted,
            (encoder, images, keys, targets),
            num_images,
        ),
        (
            f"certificate, {num_samples} samples",
            sample,
            (encoder, one_image, key, number, number),
            samples_per_chip * mesh.size,  # of one turn of its loop
        ),
        (
            "neighbours, one block",
            functools.partial(_count_block, mesh),
            (
                _placed((matrix(protocol.num_images),) * 2, everywhere),
                _placed(matrix(rows), divided),
            ),
            rows,
        ),
    )
    for title, fn, arguments, count in todo:
        on_progress(f"{name}: {title} ...")
        yield _compile(name, title, fn, arguments, count, chips[0].device_kind)


def table(topology: str, results: list[Compiled]) -> Table:
    """The results as a table."""
    shown = Table(title=f"Compiled for {topology}", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("encoder", "function"):
        shown.add_column(column, no_wrap=True)
    for column in ("images", "GFLOP/image", "MB/image", "GiB/chip", "of"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("fits")
    shown.add_column("collectives in loops")
    shown.add_column("outside")
    shown.add_column("s to compile", justify="right")
    for r in results:
        is_small = r.available is None or r.memory <= r.available
        shown.add_row(
            r.encoder, r.function, f"{r.images:,}", f"{r.flops / 1e9:.3g}", f"{r.bytes / 1e6:.3g}",
            f"{r.memory / _GIB:.2f}", "" if r.available is None else f"{r.available / _GIB:.0f}",
            "yes" if is_small else "NO", _listed(r.inner), _listed(r.outer), f"{r.seconds:.0f}",
        )  # fmt: skip
    return shown


def collectives(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives of a compiled program: ({name: number inside loops}, {... outside}).

    Args:
      hlo: the program as text; a loop is a `while`, and what its body or condition calls is inside.
    """
    called: dict[str, set[str]] = {}
    counts: dict[str, Counter] = {}
    inside: set[str] = set()
    computation = ""
    for line in hlo.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = match[1]
            called[computation], counts[computation] = set(), Counter()
            continue
        if not computation:
            continue
        lists = re.findall(rf"(?:{_CALLS})=(\{{[^}}]*\}}|[^,\s]+)", line)
        names = [name.strip("{}% ") for names in lists for name in names.split(",")]
        called[computation].update(names)
        if re.search(r"\bwhile\(", line):
            inside.update(names)
        for name in _COLLECTIVES:
            counts[computation][name] += len(re.findall(rf" {name}(?:-start)?\(", line))
    reached: set[str] = set()
    while inside:
        name = inside.pop()
        if name not in reached:
            reached.add(name)
            inside |= called.get(name, set())
    sums = (sum((counts[c] for c in counts if (c in reached) == where), Counter())
            for where in (True, False))  # fmt: skip
    inner, outer = ({k: v for k, v in total.items() if v} for total in sums)
    return inner, outer


def _compile(name, title, fn, arguments, count, kind) -> Compiled:
    """Compiles one function and reads what the compiler says."""
    start = time.monotonic()
    compiled = jax.jit(fn).lower(*arguments).compile()
    seconds = time.monotonic() - start
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    needed = sum(getattr(memory, f"{k}_size_in_bytes") for k in ("argument", "output", "temp"))
    inner, outer = collectives(compiled.as_text() or "")
    num_chips = len(jax.tree.leaves(arguments)[0].sharding.device_set)
    per_image = num_chips / count  # the analysis is of one chip's program
    return Compiled(
        name, title, count, cost.get("flops", np.nan) * per_image,
        cost.get("bytes accessed", np.nan) * per_image, needed, _MEMORY.get(kind), inner, outer,
        seconds,
    )  # fmt: skip


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


def _placed(tree: PyTree, where: NamedSharding) -> PyTree:
    """Shapes with a sharding."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, tree)


def _key() -> jax.ShapeDtypeStruct:
    """The shape of a key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def _listed(counts: dict[str, int]) -> str:
    """Collectives as text."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
