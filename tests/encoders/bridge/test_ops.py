"""Every row of the table gives what PyTorch's operation of that schema gives."""

from __future__ import annotations

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.encoders.bridge.ops import ROWS, SCHEMAS

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)


def real(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape):
    return np.abs(real(*shape)) + 0.1


def whole(*shape, high=3):
    return RNG.integers(0, high, shape).astype(np.int32)


def mask(*shape):
    return RNG.random(shape) < 0.5


UNARY = (
    "abs ceil cos erf exp expm1 floor hardsigmoid hardswish isnan mish neg relu relu6 round sigmoid"
)
UNARY = f"{UNARY} sign silu sin square tan tanh trunc alias clone detach lift_fresh_copy".split()
POSITIVE = "log log1p log2 reciprocal rsqrt sqrt".split()
BINARY = "add sub mul div eq fmod ge gt le lt ne remainder".split()
X = real(2, 6, 8, 10)  # (B,C,H,W)
IMAGE = (2, 3, 7, 9)

CASES = [
    *((f"aten.{n}.default", dict(self=x)) for n in UNARY for x in (real(2, 3), real(1), real())),
    *((f"aten.{n}.default", dict(self=positive(2, 3))) for n in POSITIVE),
    ("aten.erf.default", dict(self=whole(2, 3))),
    *((f"aten.{n}.default", dict(self=x)) for n in ("logical_not", "bitwise_not") for x in (mask(4),)),
    *(
        (f"aten.{n}.Tensor", dict(self=a, other=b))
        for n, (a, b) in itertools.product(
            BINARY,
            [(real(2, 3), real(2, 3)), (real(2, 1, 3), real(4, 1)), (real(2, 3), whole(3) + 1),
             (whole(2, 3), whole(3) + 1), (real(3), real())],
        )
    ),
    *((f"aten.{n}.Scalar", dict(self=real(2, 3), other=v)) for n in BINARY for v in (2, 0.5)),
    *((f"aten.bitwise_{n}.Tensor", dict(self=mask(2, 3), other=mask(3))) for n in ("and", "or")),
    *((f"aten.bitwise_{n}.Scalar", dict(self=whole(5), other=1)) for n in ("and", "or")),
    *((f"aten.logical_{n}.default", dict(self=mask(2, 3), other=mask(3))) for n in ("and", "or")),
    *((f"aten.{n}.default", dict(self=real(2, 3), other=real(3))) for n in ("maximum", "minimum", "atan2")),
    ("aten.add.Tensor", dict(self=real(2), other=real(2), alpha=3)),
    ("aten.sub.Tensor", dict(self=real(2), other=real(2), alpha=0.5)),
    ("aten.rsub.Scalar", dict(self=real(2), other=1, alpha=2)),
    *(("aten.div.Tensor_mode", dict(self=real(9), other=positive(9), rounding_mode=m)) for m in (None, "floor", "trunc")),
    ("aten.div.Tensor_mode", dict(self=whole(9, high=90) - 40, other=whole(9) + 2, rounding_mode="floor")),
    ("aten.div.Scalar_mode", dict(self=real(9), other=0.3, rounding_mode="floor")),
    ("aten.floor_divide.default", dict(self=real(9), other=positive(9))),
    *(("aten.pow.Tensor_Scalar", dict(self=x, exponent=e)) for x in (positive(5),) for e in (2, 3.0, 0.5, -1)),
    ("aten.pow.Tensor_Scalar", dict(self=real(5), exponent=2.0)),
    ("aten.pow.Tensor_Tensor", dict(self=positive(5), exponent=real(5))),
    ("aten.pow.Scalar", dict(self=2.0, exponent=real(5))),
    ("aten.where.self", dict(condition=mask(2, 3), self=real(3), other=real(2, 1))),
    ("aten.masked_fill.Scalar", dict(self=real(2, 3), mask=mask(3), value=-1.5)),
    ("aten.masked_fill.Tensor", dict(self=real(2, 3), mask=mask(3), value=real())),
    *(("aten.clamp.default", dict(self=real(9), **k)) for k in (dict(min=0), dict(max=0.5), dict(min=-1, max=1))),
    ("aten.clamp.Tensor", dict(self=real(2, 3), min=real(3))),
    ("aten.clamp_min.default", dict(self=real(9), min=0.1)),
    ("aten.clamp_min.Tensor", dict(self=real(9), min=real(9))),
    ("aten.clamp_max.default", dict(self=real(9), max=0.1)),
    ("aten.clamp_max.Tensor", dict(self=real(9), max=real(9))),
    ("aten.hardtanh.default", dict(self=real(9), min_val=0, max_val=0.6)),
    *(("aten.gelu.default", dict(self=real(9), approximate=a)) for a in ("none", "tanh")),
    ("aten.elu.default", dict(self=real(9), alpha=1.2, scale=1.1, input_scale=0.9)),
    ("aten.leaky_relu.default", dict(self=real(9), negative_slope=0.2)),
    ("aten.softplus.default", dict(self=real(9) * 9, beta=2, threshold=3)),
    ("aten.to.dtype", dict(self=real(3) * 5, dtype="int64")),
    ("aten.to.dtype", dict(self=mask(3), dtype="float32")),
    ("aten.to.dtype_layout", dict(self=whole(3), dtype="float32")),
    ("aten._to_copy.default", dict(self=real(3), dtype="float16")),
    ("aten.type_as.default", dict(self=whole(3), other=real(1))),
    ("aten.view.default", dict(self=real(2, 6), size=[2, -1, 3])),
    ("aten._unsafe_view.default", dict(self=real(2, 6), size=[12])),
    ("aten.reshape.default", dict(self=real(2, 6), shape=[3, 4])),
    ("aten.contiguous.default", dict(self=real(2, 3))),
    ("aten.copy.default", dict(self=real(2, 3), src=real(3))),
    ("aten.permute.default", dict(self=X, dims=[0, -1, 1, 2])),
    *(("aten.transpose.int", dict(self=X, dim0=a, dim1=b)) for a, b in ((1, 2), (-1, -3))),
    ("aten.t.default", dict(self=real(2, 3))),
    ("aten.expand.default", dict(self=real(3, 1), size=[2, -1, 4])),
    *(("aten.unsqueeze.default", dict(self=real(2, 3), dim=d)) for d in (0, -1, 1)),
    *(("aten.squeeze.dim", dict(self=real(2, 1, 3), dim=d)) for d in (1, -1, -2)),
    ("aten.squeeze.dims", dict(self=real(1, 2, 1), dim=[0, -1])),
    *(("aten.select.int", dict(self=X, dim=d, index=i)) for d, i in ((1, 0), (-1, -2))),
    *(
        ("aten.slice.Tensor", dict(self=X, dim=d, start=a, end=b, step=s))
        for d, a, b, s in ((1, 1, 5, 2), (-1, -4, -1, 1), (2, None, 2**63 - 1, 3), (0, 5, 9, 1))
    ),
    ("aten.slice_scatter.default", dict(self=real(2, 6), src=real(2, 2), dim=1, start=1, end=5, step=2)),
    ("aten.select_scatter.default", dict(self=real(2, 6), src=real(2), dim=-1, index=-2)),
    ("aten.cat.default", dict(tensors=[real(2, 3), real(2, 1)], dim=-1)),
    ("aten.cat.default", dict(tensors=[real(0), real(2, 1)])),
    ("aten.stack.default", dict(tensors=[real(2, 3), real(2, 3)], dim=-1)),
    ("aten.split_with_sizes.default", dict(self=X, split_sizes=[1, 2, 3], dim=1)),
    ("aten.split.Tensor", dict(self=X, split_size=4, dim=-1)),
    ("aten.chunk.default", dict(self=X, chunks=3, dim=-1)),
    ("aten.unbind.int", dict(self=X, dim=-2)),
    *(("aten.unfold.default", dict(self=X, dimension=d, size=3, step=s)) for d, s in ((-1, 2), (2, 1))),
    ("aten.repeat.default", dict(self=real(2, 3), repeats=[2, 1, 2])),
    ("aten.flip.default", dict(self=X, dims=[-1, 1])),
    ("aten.roll.default", dict(self=X, shifts=[-3, 2], dims=[2, 3])),
    ("aten.roll.default", dict(self=X, shifts=[5])),
    ("aten.index_select.default", dict(self=X, dim=-1, index=whole(4))),
    ("aten.index.Tensor", dict(self=X, indices=[None, whole(4), None, whole(4)])),
    ("aten.index.Tensor", dict(self=X, indices=[None, None, whole(4, 1), whole(5)])),
    ("aten._unsafe_index.Tensor", dict(self=X, indices=[None, None, whole(4, 1), whole(5)])),
    *(
        ("aten.index_put.default", dict(self=real(5, 3), indices=[np.array([0, 2])], values=real(2, 3), accumulate=a))
        for a in (False, True)
    ),
    ("aten.gather.default", dict(self=real(3, 4, 5), dim=-2, index=whole(2, 6, 5))),
    ("aten.scatter.src", dict(self=real(3, 4), dim=1, index=np.array([[0, 2], [3, 1]]), src=real(3, 4))),
    ("aten.scatter.value", dict(self=real(3, 4), dim=0, index=np.array([[0, 2], [2, 1]]), value=0.5)),
    ("aten.constant_pad_nd.default", dict(self=X, pad=[1, 2, -1, 3], value=0.5)),
    ("aten.constant_pad_nd.default", dict(self=real(2, 3, 4), pad=[0, 0, 1, 0])),
    ("aten.reflection_pad2d.default", dict(self=X, padding=[1, 2, 3, 0])),
    ("aten.reflection_pad1d.default", dict(self=real(1, 2, 5), padding=[1, 2])),
    ("aten.replication_pad2d.default", dict(self=X, padding=[1, 2, 3, 0])),
    ("aten.pixel_shuffle.default", dict(self=real(2, 8, 3, 5), upscale_factor=2)),
    ("aten.pixel_unshuffle.default", dict(self=real(2, 3, 4, 6), downscale_factor=2)),
    ("aten.full.default", dict(size=[2, 3], fill_value=2.5)),
    ("aten.full.default", dict(size=[2], fill_value=1, dtype="int64")),
    ("aten.full_like.default", dict(self=real(2, 3), fill_value=2)),
    ("aten.zeros.default", dict(size=[2, 3])),
    ("aten.ones.default", dict(size=[2, 3], dtype="bool")),
    ("aten.zeros_like.default", dict(self=whole(2, 3))),
    ("aten.ones_like.default", dict(self=whole(2, 3), dtype="float32")),
    ("aten.new_zeros.default", dict(self=real(1), size=[2])),
    ("aten.new_ones.default", dict(self=real(1), size=[2])),
    ("aten.arange.start_step", dict(start=1, end=8, step=3)),
    ("aten.arange.start_step", dict(start=0, end=1.1, step=0.25)),
    ("aten.arange.start_step", dict(start=5, end=0, step=-2, dtype="float32")),
    ("aten.scalar_tensor.default", dict(s=2.5)),
    *((f"aten.{n}.default", dict(self=real(4, 5), diagonal=d)) for n in ("tril", "triu") for d in (0, -1, 2)),
    *(
        (f"aten.{n}", dict(self=X, dim=d, keepdim=k))
        for n in ("mean.dim", "sum.dim_IntList", "amax.default", "amin.default")
        for d, k in (([1], False), ([-1, -2], True))
    ),
    ("aten.mean.default", dict(self=X)),
    ("aten.mean.dim", dict(self=whole(2, 3), dim=[1], dtype="float32")),
    ("aten.sum.default", dict(self=X)),
    ("aten.sum.dim_IntList", dict(self=mask(2, 3), dim=[1])),
    ("aten.prod.dim_int", dict(self=real(2, 3), dim=-1)),
    ("aten.cumsum.default", dict(self=X, dim=-2)),
    ("aten.cumsum.default", dict(self=mask(2, 3), dim=1, dtype="float32")),
    *((f"aten.{n}.dim", dict(self=X, dim=-1, keepdim=k)) for n in ("max", "min") for k in (False, True)),
    *((f"aten.{n}.default", dict(self=X, dim=d)) for n in ("argmax", "argmin") for d in (1, None)),
    ("aten.any.dim", dict(self=mask(2, 3), dim=-1)),
    ("aten.any.dims", dict(self=mask(2, 3), dim=[0, 1])),
    ("aten.any.default", dict(self=mask(2, 3))),
    *(("aten.var.correction", dict(self=X, dim=[-1, 1], correction=c, keepdim=True)) for c in (0, 1)),
    ("aten.var_mean.correction", dict(self=X, dim=[1], correction=0)),
    ("aten.std.correction", dict(self=X, dim=[1], correction=1)),
    *(
        ("aten.linalg_vector_norm.default", dict(self=X, ord=o, dim=[-1], keepdim=True))
        for o in (2, 1, 3, float("inf"))
    ),
    ("aten._softmax.default", dict(self=X, dim=-1, half_to_float=False)),
    ("aten._log_softmax.default", dict(self=X, dim=1, half_to_float=False)),
    ("aten.softmax.int", dict(self=X, dim=1, dtype="float32")),
    *(("aten.topk.default", dict(self=X, k=3, dim=d, largest=b)) for d, b in ((-1, True), (1, False))),
    ("aten.sort.default", dict(self=X, dim=-2, descending=True)),
    ("aten.linear.default", dict(input=real(2, 3, 4), weight=real(5, 4), bias=real(5))),
    ("aten.linear.default", dict(input=real(4), weight=real(5, 4))),
    ("aten.mm.default", dict(self=real(2, 3), mat2=real(3, 4))),
    ("aten.bmm.default", dict(self=real(5, 2, 3), mat2=real(5, 3, 4))),
    ("aten.matmul.default", dict(self=real(5, 1, 2, 3), other=real(6, 3, 4))),
    ("aten.matmul.default", dict(self=real(3), other=real(6, 3, 4))),
    ("aten.addmm.default", dict(self=real(4), mat1=real(2, 3), mat2=real(3, 4), beta=0.5, alpha=2)),
    ("aten.baddbmm.default", dict(self=real(5, 2, 4), batch1=real(5, 2, 3), batch2=real(5, 3, 4))),
    *(
        ("aten.convolution.default",
         dict(input=real(2, 6, *spatial), weight=real(*weight), bias=bias, stride=stride, padding=padding,
              dilation=dilation, transposed=transposed, output_padding=output_padding, groups=groups))
        for spatial, weight, bias, stride, padding, dilation, transposed, output_padding, groups in (
            ((9, 8), (4, 6, 3, 3), real(4), [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
            ((9, 8), (4, 3, 3, 1), None, [1, 2], [2, 0], [2, 1], False, [0, 0], 2),
            ((9, 8), (6, 1, 3, 3), real(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 6),
            ((9, 8), (6, 2, 3, 2), real(4), [2, 3], [1, 0], [1, 2], True, [1, 0], 2),
            ((9,), (4, 6, 3), real(4), [2], [1], [1], False, [0], 1),
            ((5, 4, 6), (4, 6, 2, 2, 3), None, [1, 1, 1], [1, 0, 1], [1, 1, 1], False, [0, 0, 0], 1),
        )
    ),
    ("aten.native_layer_norm.default", dict(input=X, normalized_shape=[8, 10], weight=real(8, 10), bias=real(8, 10), eps=1e-6)),
    ("aten.layer_norm.default", dict(input=X, normalized_shape=[10], weight=real(10), bias=None, eps=1e-5)),
    ("aten.rms_norm.default", dict(input=X, normalized_shape=[10], weight=real(10))),
    ("aten.group_norm.default", dict(input=X, num_groups=3, weight=real(6), bias=real(6), eps=1e-5)),
    ("aten.native_group_norm.default", dict(input=X, weight=real(6), bias=real(6), N=2, C=6, HxW=80, group=2, eps=1e-5)),
    ("aten._native_batch_norm_legit_no_training.default",
     dict(input=X, weight=real(6), bias=real(6), running_mean=real(6), running_var=positive(6), momentum=0.1, eps=1e-3)),
    *(
        ("aten.scaled_dot_product_attention.default",
         dict(query=real(2, 4, 5, 8), key=real(2, 4, 7, 8), value=real(2, 4, 7, w), attn_mask=m, scale=s))
        for m, s, w in ((None, None, 8), (real(5, 7), 0.3, 6), (np.eye(5, 7) + np.ones((5, 7)) * (np.arange(7) > 3) > 0, None, 8))
    ),
    ("aten.scaled_dot_product_attention.default",
     dict(query=real(2, 4, 5, 8), key=real(2, 2, 5, 8), value=real(2, 2, 5, 8), is_causal=True, enable_gqa=True)),
    *(
        (f"aten.max_pool2d{n}", dict(self=real(*IMAGE), kernel_size=k, stride=s, padding=p, dilation=d, ceil_mode=c))
        for n in (".default", "_with_indices.default")
        for k, s, p, d, c in (([3, 3], [2, 2], [1, 1], [1, 1], False), ([2, 3], [], [0, 1], [1, 2], True))
    ),
    *(
        ("aten.avg_pool2d.default", dict(self=real(*IMAGE), kernel_size=k, stride=s, padding=p, ceil_mode=c,
                                         count_include_pad=i, divisor_override=o))
        for k, s, p, c, i, o in (([3], [2], [1], False, False, None), ([2, 3], [2, 2], [1, 1], True, True, None), ([2, 2], [], [0, 0], True, True, 3))
    ),
    *((f"aten.{n}.default", dict(self=real(*IMAGE), output_size=s))
      for n in ("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d") for s in ([3, 4], [1, 1])),
    ("aten.adaptive_avg_pool1d.default", dict(self=real(2, 3, 7), output_size=[3])),
    ("aten.im2col.default", dict(self=X, kernel_size=[3, 2], dilation=[1, 2], padding=[1, 0], stride=[2, 1])),
    ("aten.col2im.default", dict(self=real(2, 24, 15), output_size=[9, 8], kernel_size=[2, 2], dilation=[1, 2], padding=[1, 0], stride=[2, 2])),
    *(
        (f"aten.{n}.vec", dict(input=X, output_size=o, align_corners=a, scale_factors=f))
        for n in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
        for o, f in (([5, 17], None), (None, [1.5, 0.7]))
        for a in (False, True)
        if not (a and "_aa" in n)
    ),
    *(("aten.upsample_nearest2d.vec", dict(input=X, output_size=o, scale_factors=f)) for o, f in (([5, 17], None), (None, [2.0, 1.5]))),
]  # fmt: skip

OURS = {name for name in ROWS if name.startswith("ur.")}  # `test_passes.py` tries them
SIZES = {"aten.sym_size.int", "aten.sym_numel.default"}


def to_torch(value):
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value, dtype=torch.int64 if value.dtype.kind == "i" else None)
    if isinstance(value, list):
        return [to_torch(v) for v in value]
    return value


def to_jax(value):
    if isinstance(value, np.ndarray):
        return jnp.asarray(value)
    return [to_jax(v) for v in value] if isinstance(value, list) else value


def operation(name):
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


@pytest.fixture(scope="module")
def results():
    """What all cases give, compiled together: one by one it would take ten times longer."""
    arrays = [{k: v for k, v in args.items() if is_array(v)} for _, args in CASES]
    others = [{k: v for k, v in args.items() if not is_array(v)} for _, args in CASES]

    def run(arrays):
        return [
            ROWS[name](**given, **other)
            for (name, _), given, other in zip(CASES, arrays, others, strict=True)
        ]

    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(arrays)


def is_array(value):
    if isinstance(value, list):
        return any(isinstance(v, np.ndarray) for v in value)
    return isinstance(value, np.ndarray)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n][0][5:]}")
def test_gives_what_pytorch_gives(number, results):
    name, args = CASES[number]
    given = {k: to_torch(v) for k, v in args.items()}
    if "dtype" in given and isinstance(given["dtype"], str):
        given["dtype"] = getattr(torch, given["dtype"])
    schema = operation(name)._schema
    order = [a.name for a in schema.arguments if not a.kwarg_only and a.name in given]
    keywords = {k: v for k, v in given.items() if k not in order}
    # Arguments before the last given one that are left out are defaults, by name.
    keywords |= {k: given[k] for k in order[1:]}
    want = operation(name)(*(given[k] for k in order[:1]), **keywords)
    got = results[number]
    want, got = (list(x) if isinstance(x, (list, tuple)) else [x] for x in (want, got))
    assert len(got) == len(want) or len(got) == 1  # what nobody reads is left out
    for w, g in zip(want, got, strict=False):
        w = w.numpy()
        assert np.shape(g) == w.shape, name
        if w.dtype.kind == "f":
            np.testing.assert_allclose(np.asarray(g), w, rtol=3e-5, atol=3e-6)
        else:
            np.testing.assert_array_equal(np.asarray(g), w)
        kinds = {"int64": "int32", "float64": "float32"}
        assert str(jnp.result_type(g)) == kinds.get(str(w.dtype), str(w.dtype)), name


def test_every_row_has_a_case():
    missing = set(ROWS) - {name for name, _ in CASES} - OURS - SIZES
    assert not missing, sorted(missing)
    assert len(ROWS) > 150


@pytest.mark.parametrize("name", sorted(set(ROWS) - OURS))
def test_schema_is_atens(name):
    schema = operation(name)._schema
    bare = lambda text: text.replace(" ", "").replace('"', "'").replace("aten::", "")
    related = [n for n in set(ROWS) - OURS if ROWS[n] is ROWS[name]]
    known = {a.name for n in related for a in operation(n)._schema.arguments}
    assert set(inspect.signature(ROWS[name]).parameters) <= known
    for argument in SCHEMAS[name].partition("(")[2].rpartition(") ->")[0].split(","):
        words = argument.split("=")[0].split()
        if len(words) == 2:
            assert words[1] in {a.name for a in schema.arguments}, argument
    assert bare(SCHEMAS[name].partition("(")[0]) in bare(str(schema))


@pytest.mark.parametrize(
    "name", ["aten.linear.default", "aten.matmul.default", "aten.layer_norm.default"]
)
def test_bfloat16_in_is_bfloat16_out(name):
    args = next(args for n, args in CASES if n == name)
    narrow = lambda v: jnp.asarray(v, jnp.bfloat16) if isinstance(v, np.ndarray) else v
    got = ROWS[name](**{k: narrow(v) for k, v in args.items()})
    want = ROWS[name](**{k: to_jax(v) for k, v in args.items()})
    assert got.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert error < 2e-2
