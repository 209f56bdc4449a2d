"""What is measured, done by this library: from its size to a `Workload`, one function each."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ur_jax import attacks, certify, metrics
from ur_jax.attacks import config as attack_config
from ur_jax.attacks import unsupervised
from ur_jax.certify import CERTIFICATES, enclosing, sampling
from ur_jax.certify.joint import STREAMS, StreamCenterConfig
from ur_jax.devices import data_mesh, replicate, shard
from ur_jax.encoders import loading
from ur_jax.encoders.base import Encoder
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.errors import UserError
from ur_jax.performance.ahead.programs import kernels
from ur_jax.performance.timing import Workload
from ur_jax.types import Array, PyTree

SIGMA = 0.25
NAME = "ur_jax"


class Size(NamedTuple):
    """How much one run does.

    Attributes:
      encoder: a name of `ENCODERS` ("demo" has its trained weights, the others random ones), or
        what `load_encoder` takes.
      dtype: compute dtype.
      batch_size: images, over all devices.
      num_steps: steps of an attack.
      num_samples: noisy samples of an image; cap of a certificate's.
      num_center: samples that give a certificate's center.
      num_rows: rows of the bank that distances go to.
    """

    encoder: str
    dtype: str
    batch_size: int
    num_steps: int
    num_samples: int
    num_center: int
    num_rows: int


# Of Python's work, which is no faster in threads: they compile in parallel, and that is outside.
_TRACING = threading.RLock()


def make_encoder(name: str, dtype: str) -> Encoder:
    """Returns an encoder, a published one with random weights: no speed depends on them."""
    with _TRACING:
        return _make_encoder(name, dtype)


@functools.lru_cache(maxsize=4)
def _make_encoder(name: str, dtype: str) -> Encoder:
    """The encoder, made once for the works that follow each other."""
    if name == "demo" or name not in ENCODERS:
        return loading.load_encoder(name, dtype=dtype)
    return loading.make_encoder(ENCODERS[name], random_variables(name), dtype=dtype)


def random_variables(name: str) -> PyTree:
    """Unfolded variables of an encoder's network, scaled so that activations stay near one."""
    spec, rng = ENCODERS[name], np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, *spec.input_size, 3), jnp.float32)
    shapes = jax.eval_shape(spec.network(folded=False).init, jax.random.key(0), images)

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        scale = math.sqrt(1.25 / math.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.02
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_images(size: Size) -> np.ndarray:
    """Images [batch_size,H,W,3] float32 in [0,1]."""
    shape = (size.batch_size, *make_encoder(size.encoder, size.dtype).input_size, 3)
    return np.random.default_rng(1).random(shape, np.float32)


def random_rows(num: int, dimension: int) -> np.ndarray:
    """Representations [num, dimension] float32."""
    return np.random.default_rng(2).standard_normal((num, dimension), np.float32)


def forward(size: Size) -> Workload:
    """Representations of a batch."""
    return _compiled(_encode, _inputs(size), items=size.batch_size)


def u_pgd(size: Size) -> Workload:
    """An untargeted attack with its history: the clean pass, the steps, a last pass."""
    inputs = _inputs(size)
    keys = shard(data_mesh(), attacks.image_keys(jax.random.key(0), size.batch_size))
    numbers, rest = attack_config.split(attacks.AttackConfig(num_steps=size.num_steps))
    dynamic = dict(**inputs, keys=keys, target=None, start=None, size=numbers)
    items = size.batch_size * size.num_steps
    workload = _compiled(unsupervised._u_pgd, dynamic, dict(config=rest), items=items)
    workload = workload._replace(note=f"{size.num_steps} steps")
    if _counts_kernels():
        return workload
    # A loop's body counts once in the compiler's analysis, beside the two passes outside it.
    beside = _compiled(_encode, inputs, items=size.batch_size)
    of_run = lambda total, one: (
        None if None in (total, one) else (size.num_steps * (total - 2 * one) + 2 * one)
    )
    return workload._replace(
        flops=of_run(workload.flops, beside.flops),
        bytes_moved=of_run(workload.bytes_moved, beside.bytes_moved),
    )


def noisy_samples(size: Size) -> Workload:
    """Representations of noisy samples of one image, in batches."""
    encoder, images = _inputs(size).values()
    mesh = data_mesh()
    dynamic = dict(
        operand=encoder,
        image=replicate(mesh, random_images(size)[0]),
        key=jax.random.key(0),
        index=jnp.int32(0),
        first=jnp.int32(0),
    )
    num_batches = math.ceil(size.num_samples / len(images))
    n = num_batches * len(images)
    static = dict(fn=_encode_samples, n=n, sigma=SIGMA, clip=False, mesh=mesh)
    static["batch_size"] = len(images) // mesh.size
    workload = _compiled(sampling.sample_outputs, dynamic, static, items=n)
    workload = workload._replace(note=f"{n:,} samples")
    if _counts_kernels():
        return workload
    times = lambda value: None if value is None else value * num_batches  # a loop's body, as above
    return workload._replace(flops=times(workload.flops), bytes_moved=times(workload.bytes_moved))


def noise(size: Size, kind: Literal["float", "grid"] = "float") -> Workload:
    """Noisy samples of one image alone, before any encoder."""
    images, number = shard(data_mesh(), random_images(size)), np.arange(size.batch_size)
    dynamic = dict(
        images=images, key=jax.random.key(0), indices=jnp.zeros_like(number),
        samples=jnp.asarray(number),
    )  # fmt: skip
    draw = jax.jit(sampling.noisy_samples, static_argnames=("sigma", "clip", "noise"))
    static = dict(sigma=SIGMA, clip=True, noise=kind)
    return _compiled(draw, dynamic, static, items=size.batch_size)


def grid_noise(size: Size) -> Workload:
    """The same of integer noise."""
    return noise(size, "grid")


def center(size: Size) -> Workload:
    """The sample with the smallest median distance to all: the first stage of a certificate."""
    mesh = data_mesh()
    dimension = make_encoder(size.encoder, size.dtype).dimension
    rows = replicate(mesh, random_rows(size.num_center, dimension))
    static = dict(divergence="l2", mesh=mesh)
    workload = _compiled(_medians, dict(representations=rows), static, items=1)
    return workload._replace(note=f"{len(rows):,} samples")


def distances(size: Size) -> Workload:
    """Ranks of a batch's images among the rows of a bank, by exact comparisons."""
    dimension = make_encoder(size.encoder, size.dtype).dimension
    mesh, rows = data_mesh(), random_rows(size.num_rows, dimension)
    clean: Any = rows[: size.batch_size]
    attacked: Any = clean + 0.1 * random_rows(len(clean), dimension)
    bank, indices = jnp.asarray(rows), np.arange(len(clean))
    run = lambda: metrics.neighbour_ranks(
        attacked, clean, bank, own_index=indices, block_size=len(rows), mesh=mesh
    )
    return _called(run, items=len(clean) * len(rows))._replace(note=f"{len(rows):,} rows")


def certificates(size: Size, bound: Literal["exact", "union"] = "exact") -> Workload:
    """Certified divergence radii of two images at the paper's sigma and failure probabilities.

    Fixed ("exact") draws all samples, adaptive ("union") stops when the radius is known to 5 %.
    """
    encoder, images = _inputs(size).values()
    mesh = data_mesh()
    settings = certify.CenterConfig(n0=size.num_center, n=size.num_samples, bound=bound)
    some = np.asarray(images[:2])
    per_device = len(images) // mesh.size
    run = lambda: list(
        certify.center_smoothing(
            encoder, some, jax.random.key(0), config=settings, mesh=mesh, batch_size=per_device
        )
    )
    return _called(run, items=len(some))


def adaptive_certificates(size: Size) -> Workload:
    """The same, tested sequentially."""
    return certificates(size, "union")


def stream(size: Size, methods: Sequence[str] = ("geometric_median",)) -> Workload:
    """Certificates of other smoothed encoders, of one image from one pass over its noise."""
    encoder, images = _inputs(size).values()
    some = np.round(255 * np.asarray(images[:1])).astype(np.float32) / np.float32(255)
    number = size.num_samples
    settings: dict[str, Any] = dict(n0=size.num_center, n=number, m=number)
    models: dict[str, Any] = {name: encoder for name in methods}
    if "neighbour" in models:
        models["neighbour"] = certify.directions_of(encoder, np.asarray(encoder(images)))
    kinds = {k: v.settings for k, v in CERTIFICATES.items()} | {"center": StreamCenterConfig}
    parts = {
        name: certify.part_of(model, kinds[name](**settings)) for name, model in models.items()
    }
    run = lambda: list(
        certify.certify_stream(
            encoder, some, jax.random.key(0), parts=parts, batch_size=size.batch_size
        )
    )
    return _called(run, items=1)


def streams(size: Size) -> Workload:
    """All of them, and a bank of the batch's images, from one pass."""
    return stream(size, ("center", *STREAMS))


def training(size: Size) -> Workload:
    """Steps of MoCo v2 on ready views: two passes, one gradient of all weights, the queue."""
    # The only place that knows how a training step is called.
    from ur_jax import training as library
    from ur_jax.encoders.networks import heads
    from ur_jax.encoders.networks.network import Network

    if size.encoder not in ENCODERS:
        raise UserError(f"Training is measured of published networks, not of {size.encoder!r}.")
    spec = ENCODERS[size.encoder]
    variables = random_variables(size.encoder)
    network = spec.network(folded=False)
    if not isinstance(network.head, heads.MocoV2Head):
        width = make_encoder(size.encoder, "float32").dimension
        network = Network(network.backbone, heads.MocoV2Head(width, 128))
        images = jnp.zeros((1, *spec.input_size, 3))
        variables = jax.jit(network.init)(jax.random.key(0), images)
    method = library.MocoV2(network, spec.mean, spec.std, queue_size=16 * size.batch_size)
    optimizer = library.sgd(lambda step: 0.03)
    mesh = data_mesh()
    state = replicate(mesh, library.init_state(method, variables, optimizer, jax.random.key(0)))
    images = shard(mesh, random_images(size))
    views, key = library.Views(images, images), jax.random.key(1)
    step = jax.jit(library.train_step, static_argnums=(0, 1, 2), donate_argnums=3)
    holder = [state]

    def run():
        holder[0], *_ = step(method, optimizer, None, holder[0], views, key)
        return holder[0].step

    return _called(run, items=size.batch_size)


class Work(NamedTuple):
    """A kind of work: how it is made, its unit, how many of the unit a number counts, and whether
    making it compiles one program and runs nothing."""

    make: Callable[[Size], Workload]
    unit: str
    per: float = 1.0
    is_one_program: bool = False


WORKS: dict[str, Work] = {
    "u_pgd": Work(u_pgd, "image-steps/s", is_one_program=True),
    "forward": Work(forward, "images/s", is_one_program=True),
    "noisy": Work(noisy_samples, "samples/s", is_one_program=True),
    "noise": Work(noise, "samples/s", is_one_program=True),
    "grid-noise": Work(grid_noise, "samples/s", is_one_program=True),
    "center": Work(center, "centers/s", is_one_program=True),
    "distances": Work(distances, "pairs/s"),
    "training": Work(training, "images/s"),
    "certificates": Work(certificates, "certificates/h", 3600.0),
    "adaptive": Work(adaptive_certificates, "certificates/h", 3600.0),
    "stream": Work(stream, "images/h", 3600.0),
    "streams": Work(streams, "images/h", 3600.0),
}
"""Every work by name."""


@jax.jit
def _encode(encoder: Encoder, images: Array) -> Array:
    """The encoder, compiled."""
    return encoder(images)


def _encode_samples(encoder, images):
    """As the certificates call it; a function object that stays the same."""
    return encoder(images)


@functools.partial(jax.jit, static_argnames=("divergence", "mesh"))
def _medians(representations: Array, divergence: str, mesh: Mesh) -> Array:
    """Median distances, compiled."""
    return enclosing.median_distances(representations, divergence=divergence, mesh=mesh)


def _inputs(size: Size) -> dict[str, Any]:
    """The encoder and a batch of images on the devices."""
    mesh = data_mesh()
    encoder = replicate(mesh, make_encoder(size.encoder, size.dtype))
    return dict(encoder=encoder, images=shard(mesh, random_images(size)))


def _compiled(
    fn: Any, dynamic: dict[str, Any], static: dict[str, Any] | None = None, *, items: float
) -> Workload:
    """A jitted function of keyword arguments, compiled ahead, with what the compiler says of it."""
    started = time.perf_counter()
    with _TRACING:
        lowered = fn.lower(**dynamic, **static or {})
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    kinds = ("argument", "output", "temp")
    held = memory and sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
    flops, bytes_moved = program_cost(compiled)
    return Workload(
        implementation=NAME,
        run=lambda: jax.block_until_ready(compiled(**dynamic)),
        items=items,
        compile_seconds=seconds,
        flops=flops,
        bytes_moved=bytes_moved,
        memory=held,
    )


def _called(run: Callable[[], Any], items: float) -> Workload:
    """A function of several programs, which its first call compiles."""
    waiting = lambda: jax.block_until_ready(run())
    started = time.perf_counter()
    waiting()
    return Workload(NAME, waiting, items, time.perf_counter() - started)


def program_cost(compiled: Any) -> tuple[float | None, float | None]:
    """Operations and bytes of a run on all devices, None where they are not known: by the
    compiler's analysis, which counts a loop's body once, or by the kernels."""
    devices = jax.local_device_count()
    if _counts_kernels():
        found = kernels(compiled.as_text())
        total = lambda of: devices * sum(kernel.times * of(kernel) for kernel in found)
        return total(lambda kernel: kernel.flops), total(lambda kernel: kernel.bytes)
    analysis = compiled.cost_analysis()
    analysis = (analysis[0] if isinstance(analysis, list) else analysis) or {}
    values = (analysis.get(what) for what in ("flops", "bytes accessed"))
    flops, nbytes = (devices * value if value and value > 0 else None for value in values)
    return flops, nbytes


def _counts_kernels() -> bool:
    """Whether costs are read of the program: of a GPU's, most of which is calls of libraries, the
    analysis says nothing."""
    return jax.default_backend() == "gpu"
