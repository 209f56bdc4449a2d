"""What is read of a compiled program."""

from __future__ import annotations

import jax
import numpy as np

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
