"""Devices that a program can be compiled for on a machine without them: TPU pods, NVIDIA GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ur_jax.errors import MissingPackageError, UserError

_GIB = 2**30
_GPU_SHARE = 0.75  # of a GPU's memory JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)
_COPY_SHARE, _PRODUCT_SHARE = 0.9, 0.78  # of the data sheets' rates, that large kernels reach


class Chip(NamedTuple):
    """A kind of chip, by its data sheet.

    Attributes:
      memory: bytes that a program may use; of a TPU v2 or v3, those of a core, which is a device.
      bandwidth: bytes per second to and from memory.
      flops: {dtype: dense operations per second} of a product, as JAX does it by default.
    """

    memory: float
    bandwidth: float
    flops: Mapping[str, float]

    def seconds(self, nbytes: float, flops: float, dtype: str) -> float:
        """The roofline: how long a kernel takes at least, at what large ones reach of the rates."""
        moving = nbytes / (_COPY_SHARE * self.bandwidth)
        return max(moving, flops / (_PRODUCT_SHARE * self.flops[dtype]))


class _Gpu(NamedTuple):
    """What the compiler must know of a GPU, beside what all have in common."""

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int  # float32 units of a core
    clock: float  # GHz
    memory: int
    bandwidth: float
    cache: int
    shared: int  # bytes of a core's shared memory; a block may have 1 KiB less
    threads: int  # of a core
    bfloat16: float
    tf32: float


_GPUS = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 85_100_068_864, 2.039e12,
                 40 << 20, 164 << 10, 2048, 312e12, 156e12),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 84_978_434_048, 3.352e12,
                 50 << 20, 228 << 10, 2048, 989e12, 495e12),
    "h200": _Gpu("NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 1.98, 151_397_597_184, 4.8e12,
                 50 << 20, 228 << 10, 2048, 989e12, 495e12),
    "b200": _Gpu("NVIDIA B200", (10, 0), 148, 128, 1.965, 191_514_411_008, 7.672e12,
                 132_644_864, 228 << 10, 2048, 2250e12, 1125e12),
    "l4": _Gpu("NVIDIA L4", (8, 9), 58, 128, 2.04, 23_580_639_232, 0.3e12,
               48 << 20, 100 << 10, 1536, 121e12, 60e12),
}  # fmt: skip


def _tpu(memory: float, bandwidth: float, flops: float) -> Chip:
    """Products of float32 are made in bfloat16 by default."""
    return Chip(memory * _GIB, bandwidth, {"bfloat16": flops, "float32": flops})


_TPUS = {
    "TPU v2": _tpu(8, 0.35e12, 22.5e12),
    "TPU v3": _tpu(16, 0.45e12, 61.5e12),
    "TPU v4": _tpu(32, 1.228e12, 275e12),
    "TPU v5 lite": _tpu(16, 0.819e12, 197e12),
    "TPU v5": _tpu(95, 2.765e12, 459e12),
    "TPU v6 lite": _tpu(32, 1.64e12, 918e12),
}
_SEPARATE_CORES = ("TPU v2", "TPU v3")  # later chips with two cores run them as one device
# What libtpu asks for on a machine without a TPU; any accelerator type will do.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_EXAMPLES = "h100:8, h100:8x4 (four hosts of 8), v5e:16x16, v4:2x2x2"


class Target(NamedTuple):
    """What is compiled for.

    Attributes:
      name: as it was asked for.
      devices: abstract devices, for a mesh; each knows its host.
      chip: what one of them does; None where it is not known.
      options: the compiler's.
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    options: dict[str, Any]

    @property
    def num_hosts(self) -> int:
        """How many hosts the devices are on."""
        return len({device.process_index for device in self.devices})

    @property
    def memory(self) -> int | None:
        """Bytes that a program may use of a device; None if not known."""
        return None if self.chip is None else int(self.chip.memory)


def find(name: str) -> Target:
    """The devices of a name: "h100", "h100:8" (GPUs of a host), "h100:8x4" (four such hosts), and
    likewise a100, h200, b200 and l4; or a TPU topology such as "v5e:16x16".

    Raises:
      UserError: for an unknown name.
      MissingPackageError: if the compiler for it is not installed.
    """
    kind, colon, count = name.partition(":")
    if kind.lower() in _GPUS:
        return _gpus(name, kind.lower(), count if colon else "1")
    if not re.fullmatch(r"v\d\w*:\d+(x\d+)*", name):
        raise UserError(
            f"Expected a device to compile for, one of {', '.join(_GPUS)} or a TPU's topology, "
            f"such as {_EXAMPLES}; got {name!r}."
        )
    return _pod(name)


def has_gpu_compiler() -> bool:
    """Whether what compiles for NVIDIA GPUs is installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    names = (f"jax_plugins.xla_cuda{version}" for version in (12, 13))
    return any(importlib.util.find_spec(name) is not None for name in names)


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def _gpus(name: str, kind: str, count: str) -> Target:
    """GPUs of one kind on some hosts."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", count)
    if match is None:
        raise UserError(
            f"Expected {kind}:GPUS or {kind}:GPUSxHOSTS, such as {kind}:8 or {kind}:8x4, got "
            f"{name!r}."
        )
    if not has_gpu_compiler():
        raise MissingPackageError(
            f"Compiling for {kind} needs XLA's compiler for GPUs, which is not installed: "
            'pip install "ur_jax[compile-gpu]" (no GPU and no driver is needed).'
        )
    per_host, num_hosts = int(match[1]), int(match[2] or 1)
    shape = f"1x{num_hosts}x{per_host}"  # slices, hosts, devices
    gpu = _GPUS[kind]
    try:
        described = topologies.get_topology_desc(
            shape, "cuda", topology=shape, target_config=_configuration(gpu)
        )
    except Exception as error:  # XLA has no common class for it
        raise UserError(
            f"The compiler for GPUs does not start ({str(error).splitlines()[0]}); set "
            f"JAX_PLATFORMS=cpu, and check that jax-cuda12-plugin is of version {jax.__version__}."
        ) from error
    rates = {"bfloat16": gpu.bfloat16, "float32": gpu.tf32}
    chip = Chip(_GPU_SHARE * gpu.memory, gpu.bandwidth, rates)
    # Nothing can be timed here, and what Triton's kernels are worth untuned says nothing: the
    # library's products with their epilogues stand for what a tuned program has.
    return Target(name, list(described.devices), chip, {"xla_gpu_enable_triton_gemm": False})


def _configuration(gpu: _Gpu) -> str:
    """The compiler's description of a GPU (GpuTargetConfigProto, as text)."""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
  shared_memory_per_block: {48 << 10} shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock}
  block_dim_limit_x: {2**31 - 1} block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.cache}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" device_description_str: "{gpu.name}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
"""


def _pod(name: str) -> Target:
    """The devices of a TPU topology."""
    if not has_tpu_compiler():
        raise MissingPackageError(
            f"Compiling for {name} needs libtpu, which is not installed: "
            'pip install "ur_jax[tpu]" (no TPU is needed).'
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        chips = topologies.get_topology_desc(name, "tpu").devices
        kind = chips[0].device_kind
        if any(chip.core_on_chip for chip in chips) and kind not in _SEPARATE_CORES:
            described = topologies.get_topology_desc(name, "tpu", chip_config_name="megacore")
            chips = described.devices
    except Exception as error:  # libtpu and XLA have no common class for it
        raise UserError(
            f"Expected a TPU topology such as v5e:16x16, v4:2x2x2 or v6e:4x4, got {name!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Target(name, list(chips), _TPUS.get(kind), {})
