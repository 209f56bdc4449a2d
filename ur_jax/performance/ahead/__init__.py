"""Compiling for TPU pods and NVIDIA GPUs on a machine without them, and reading the programs.

    ur-jax benchmark --compile-only h100:8 --encoders mocov2 --dtype bfloat16

`targets` knows the devices, `programs` reads a program's text, `compiling` makes the programs of an
encoder, `tables` shows what was found.
"""

from ur_jax.performance.ahead.compiling import Compiled, compile_encoder, compile_function
from ur_jax.performance.ahead.programs import Kernel, collectives, kernels
from ur_jax.performance.ahead.tables import kernel_table, listed, table
from ur_jax.performance.ahead.targets import Target, find, has_gpu_compiler, has_tpu_compiler

__all__ = [
    "Compiled",
    "Kernel",
    "Target",
    "collectives",
    "compile_encoder",
    "compile_function",
    "find",
    "has_gpu_compiler",
    "has_tpu_compiler",
    "kernel_table",
    "kernels",
    "listed",
    "table",
]
