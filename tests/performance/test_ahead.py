"""What is read of a compiled program."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ur_jax.errors import MissingPackageError, UserError
from ur_jax.performance import ahead


def test_collectives_inside_loops_are_told_from_those_outside():
    program = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %g = f32[8] all-gather(%p), dimensions={0}
}

%body.1 (c: (f32[8])) -> (f32[8]) {
  %r = f32[8] all-reduce-start(%x), to_apply=%add
  %f = f32[8] fusion(%r), kind=kLoop, calls=%fused
}

%condition.2 (c: (f32[8])) -> pred[] {
  ROOT %p = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.3 (x: f32[8]) -> f32[8] {
  %w = (f32[8]) while(%t), condition=%condition.2, body=%body.1
  ROOT %q = f32[8] collective-permute(%y), source_target_pairs={{0,1}}
}
"""
    inner, outer = ahead.collectives(program)
    assert inner == {"all-reduce": 1, "all-gather": 1} and outer == {"collective-permute": 1}
    # The same of a real program: a psum in each turn, and one at the end.
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def loop(x):
        turn = lambda _, y: jax.lax.psum(y, "data") * 0.5
        return jax.lax.fori_loop(0, 3, turn, x)

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(np.ones(8, np.float32)).compile().as_text()
    assert ahead.collectives(text) == ({"all-reduce": 1}, {})


PROGRAM = """\
HloModule jit_f, is_scheduled=true

%fused_write (p0: f32[100,8], p1: f32[8], p2: s32[]) -> f32[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %row = f32[1,8]{1,0} bitcast(%p1)
  %zero = s32[] constant(0)
  ROOT %put = f32[100,8]{1,0} dynamic-update-slice(%p0, %row, %p2, %zero)
}

%fused_read (p0: bf16[10,64,32], p1: s32[]) -> bf16[64,32] {
  %p0 = bf16[10,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %b = bf16[64,32]{1,0} bitcast(%one)
}

%body (c: (s32[], f32[100,8], bf16[10,64,32])) -> (s32[], f32[100,8], bf16[10,64,32]) {
  %c = (s32[], f32[100,8]{1,0}, bf16[10,64,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %all = f32[100,8]{1,0} get-tuple-element(%c), index=1
  %x = bf16[10,64,32]{2,1,0} get-tuple-element(%c), index=2
  %taken = bf16[64,32]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_read
  %w = bf16[32,16]{1,0} constant({...})
  %y = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%taken, %w), \
custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(f)/while/body/transpose(jvp(Net))/block3/expand/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %row = f32[8]{0} constant({...})
  %put = f32[100,8]{1,0} fusion(%all, %row, %i), kind=kLoop, calls=%fused_write
  ROOT %t = (s32[], f32[100,8]{1,0}, bf16[10,64,32]{2,1,0}) tuple(%i, %put, %x)
}

%condition (c: (s32[], f32[100,8], bf16[10,64,32])) -> pred[] {
  %c = (s32[], f32[100,8]{1,0}, bf16[10,64,32]{2,1,0}) parameter(0)
  %n = s32[] constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %p = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[2,8,8,4], k: bf16[6,3,3,4], v: bf16[2,8,8,6]) -> bf16[2,8,8,6] {
  %x = bf16[2,8,8,4]{3,2,1,0} parameter(0)
  %k = bf16[6,3,3,4]{3,2,1,0} parameter(1)
  %v = bf16[2,8,8,6]{3,2,1,0:S(1)} parameter(2)
  %t = (s32[], f32[100,8]{1,0}, bf16[10,64,32]{2,1,0}) tuple(%a, %b, %d)
  %w = (s32[], f32[100,8]{1,0}, bf16[10,64,32]{2,1,0}) while(%t), condition=%condition, body=%body
  %z = (bf16[2,8,8,6]{3,2,1,0}, u8[64]{0}) custom-call(%x, %k, %v), \
custom_call_target="__cudnn$convBiasActivationForward", dim_labels=b01f_o01i->b01f
  ROOT %r = bf16[2,8,8,6]{3,2,1,0} get-tuple-element(%z), index=0
}
"""


def test_kernels_are_counted_as_often_as_their_loop_turns_and_by_what_they_move():
    read, product, written, convolution = ahead.kernels(PROGRAM)
    assert [k.times for k in (read, product, written, convolution)] == [5, 5, 5, 1]
    assert read.bytes == 64 * 32 * 2 * 2 + 4  # a slice is read, not its whole array; and a number
    assert written.bytes == 8 * 4 * 2 + 4  # in place
    assert product.bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)  # without the library's workspace
    assert product.flops == 2 * 64 * 32 * 16
    assert product[:3] == ("product", "gradient of block3/expand/dot_general", "bf16[64,16]")
    assert convolution.bytes == 2 * (2 * 8 * 8 * 4 + 6 * 3 * 3 * 4 + 2 * 8 * 8 * 6)  # S(1): on chip
    assert convolution.flops == 2 * (2 * 8 * 8) * (3 * 3 * 4 * 6)
    strided = PROGRAM.replace("dim_labels=b01f", "window={size=1x1 stride=2x2}, dim_labels=b01f")
    of_quarter = ahead.kernels(strided)[-1]  # that a kernel of 1x1 with a stride of 2 reads
    assert convolution.bytes - of_quarter.bytes == 2 * (2 * 8 * 8 * 4) * 3 / 4


def test_kernels_of_a_real_program_agree_with_the_compilers_count():
    def loop(x, kernel):
        conv = lambda y: jax.lax.conv_general_dilated(
            y, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        by_input = jax.vjp(conv, x)[1](conv(x))[0]
        by_kernel = by_input.reshape(4, -1).T @ x.reshape(4, -1)
        return by_kernel.sum()

    shapes = np.ones((4, 16, 16, 3), np.float32), np.ones((3, 3, 3, 8), np.float32)
    program = jax.jit(loop).lower(*shapes).compile()
    counted = sum(k.times * k.flops for k in ahead.kernels(program.as_text()))
    exact = 2 * 2 * (4 * 8 * 8) * (3 * 3 * 3 * 8) + 2 * 4 * (16 * 16 * 3) ** 2
    assert counted == exact


@pytest.mark.parametrize("name", ["h10", "h100:", "h100:0", "h100:8x", "v5e", "", "h100:8x4x2"])
def test_a_device_that_there_is_not_is_refused_in_one_line(name):
    with pytest.raises(UserError) as told:
        ahead.find(name)
    assert repr(name) in str(told.value) and "\n" not in str(told.value)


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(ahead.targets, "has_gpu_compiler", lambda: False)
    monkeypatch.setattr(ahead.targets, "has_tpu_compiler", lambda: False)
    for name, extra in (("h100:8", "compile-gpu"), ("v5e:2x2", "tpu")):
        with pytest.raises(MissingPackageError, match=rf"ur_jax\[{extra}\]"):
            ahead.find(name)
