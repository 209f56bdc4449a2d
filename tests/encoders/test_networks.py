"""The networks in miniature against plain PyTorch twins, and the published layouts' variants."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_rules

from ur_jax.encoders import mapping
from ur_jax.encoders.networks import heads
from ur_jax.encoders.networks.amdim import AMDIM
from ur_jax.encoders.networks.layers import fold_batch_norm
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.resnet import Bottleneck, ResNet
from ur_jax.encoders.networks.simclr import SimCLRResNet
from ur_jax.encoders.networks.vit import ViT, resize_positions, sincos_positions
from ur_jax.encoders.zoo import ENCODERS


def tiny(name, network, size, **changes):
    """The spec `name` with a small network in place of the published one."""
    network = functools.partial(lambda net, folded, **_: net(folded), network)
    return dataclasses.replace(ENCODERS[name], network=network, input_size=size, **changes)


def fill_shapes(shapes):
    return {key: reference_rules.fill(key, shape) for key, shape in shapes.items()}


def torch_tensors(tensors):
    torch = pytest.importorskip("torch")
    return {key: torch.from_numpy(np.array(t)).double() for key, t in tensors.items()}


def agree(spec, tensors, twin, output="backbone"):
    """Our network, unfolded and folded, against the twin in float64."""
    variables = mapping.map_tensors(tensors, spec).variables
    images = reference_rules.images(*spec.input_size)
    inputs = torch_tensors({"x": images})["x"].permute(0, 3, 1, 2)
    expected = twin(torch_tensors(tensors), inputs).numpy()
    for folded in (False, True):
        network = spec.network(folded=folded)
        used = fold_batch_norm(variables) if folded else variables
        actual = np.asarray(jax.jit(network.apply)(used, images)[output])
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * abs(expected).max())


def batch_norm(p, name, x):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    if f"{name}.weight" not in p:
        return x
    return x * p[f"{name}.weight"].view(shape) + p[f"{name}.bias"].view(shape)


def norm_shapes(name, channels, affine=True):
    gain = ("weight", "bias") if affine else ()
    return {f"{name}.{key}": (channels,) for key in (*gain, "running_mean", "running_var")}


# Vision transformers

VIT = functools.partial(ViT, dim=24, depth=2, num_heads=3, patch_size=4, image_size=16)


def vit_shapes(dim=24, depth=2, patch=4, tokens=17):
    linear = lambda name, i, o: {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
    scale = lambda name: {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for block in (f"blocks.{index}" for index in range(depth)):
        shapes |= scale(f"{block}.norm1") | linear(f"{block}.attn.qkv", dim, 3 * dim)
        shapes |= linear(f"{block}.attn.proj", dim, dim) | scale(f"{block}.norm2")
        shapes |= linear(f"{block}.mlp.fc1", dim, 4 * dim)
        shapes |= linear(f"{block}.mlp.fc2", 4 * dim, dim)
    return shapes | scale("norm")


def vit_twin(p, x, num_heads=3, depth=2):
    import torch
    from torch.nn import functional as F

    linear = lambda name, x: F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])
    norm = lambda name, x: F.layer_norm(
        x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6
    )
    patch = p["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1) + p["pos_embed"]
    for block in (f"blocks.{index}" for index in range(depth)):
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        query, key, value = (
            t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1)
        )
        attention = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        x = x + linear(f"{block}.attn.proj", (attention @ value).transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", x)[:, 0]


def test_vit_equals_a_torch_twin():
    spec = tiny("mae", lambda folded: Network(VIT(), heads.NoHead()), (16, 16))
    agree(spec, fill_shapes(vit_shapes()), vit_twin)


def test_positions_resized_to_their_own_grid_are_unchanged():
    table = jnp.asarray(reference_rules.fill("pos_embed", (17, 24)))
    assert resize_positions(table, (4, 4), (4, 4)) is table


def test_resized_positions_keep_a_linear_function():
    # A cubic kernel reproduces linear functions wherever it does not meet the border.
    at = lambda n, scale: (np.arange(n) + 0.5) / scale
    row, column = np.meshgrid(at(8, 1), at(8, 1), indexing="ij")
    table = np.stack([2 * row - column, 3 + 0 * row], -1).reshape(64, 2)
    table = jnp.asarray(np.concatenate([[[7.0, -7.0]], table]), jnp.float32)
    resized = np.asarray(resize_positions(table, (8, 8), (16, 24)))
    row, column = np.meshgrid(at(16, 2), at(24, 3), indexing="ij")
    patches = resized[1:].reshape(16, 24, 2)
    inner = np.s_[4:-4, 6:-6]
    np.testing.assert_array_equal(resized[0], [7.0, -7.0])
    np.testing.assert_allclose(patches[inner][..., 0], (2 * row - column)[inner], atol=1e-5)
    np.testing.assert_allclose(patches[..., 1], 3, atol=1e-5)


def test_vit_takes_other_image_sizes_and_refuses_odd_ones():
    network, key = VIT(), jax.random.key(0)
    variables = jax.eval_shape(network.init, key, jnp.zeros((1, 16, 16, 3)))
    assert jax.eval_shape(network.apply, variables, jnp.zeros((2, 24, 20, 3))).shape == (2, 24)
    with pytest.raises(ValueError, match="divisible by the patch size 4, got 18x16"):
        jax.eval_shape(network.apply, variables, jnp.zeros((1, 18, 16, 3)))
    with pytest.raises(ValueError, match="divisible by num_heads, got 24 and 5"):
        jax.eval_shape(VIT(num_heads=5).init, key, jnp.zeros((1, 16, 16, 3)))


def test_sincos_table_is_the_reference_one(golden):
    np.testing.assert_allclose(
        sincos_positions(4, 4, 48), golden("training_mocov3.npz")["pos_embed"][0], atol=1e-6
    )
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions(4, 4, 6)


def test_frozen_parts_of_a_vit_get_no_gradient():
    network = VIT(depth=1, fixed_positions=True, freeze_patches=True)
    images = reference_rules.images(16, 16)
    variables = jax.jit(network.init)(jax.random.key(0), images)
    np.testing.assert_array_equal(variables["params"]["positions"], sincos_positions(4, 4, 24))
    gradients = jax.jit(jax.grad(lambda v: (network.apply(v, images) ** 3).sum()))(variables)
    gradients = gradients["params"]
    zero = {name for name, g in gradients.items() if not any(map(jnp.any, jax.tree.leaves(g)))}
    assert zero == {"patch_kernel", "patch_bias", "positions"}


# MoCo v3 in training mode, against the reference implementation


def _mocov3_tiny():
    vit = ViT(48, 2, 3, 16, image_size=64, fixed_positions=True, freeze_patches=True)
    network = Network(vit, heads.mocov3_projector(32, 16))
    return network, heads.mocov3_predictor(32, 16)


def _mocov3_shapes(encoder):
    widths = ((48, 32), (32, 32), (32, 16))
    shapes = vit_shapes(48, 2, 16)
    for (i, o), layer in zip(widths, (0, 3, 6), strict=True):
        shapes |= {f"head.{layer}.weight": (o, i)} | norm_shapes(f"head.{layer + 1}", o, layer < 6)
    return {f"{encoder}.{key}": shape for key, shape in shapes.items()}


def test_mocov3_loss_in_training_mode(golden):
    reference = golden("training_mocov3.npz")
    network, predictor = _mocov3_tiny()
    variables = {}
    for encoder in ("base_encoder", "momentum_encoder"):
        spec = tiny("mocov3", lambda folded: network, (64, 64), prefix=f"{encoder}.", ignored=())
        tensors = fill_shapes(_mocov3_shapes(encoder))
        tensors[f"{encoder}.pos_embed"] = reference["pos_embed"]
        variables[encoder] = mapping.map_tensors(tensors, spec).variables
    blend = lambda k, q: 0.99 * k + 0.01 * q
    momentum_params = jax.tree.map(
        blend, variables["momentum_encoder"]["params"], variables["base_encoder"]["params"]
    )
    momentum = {**variables["momentum_encoder"], "params": momentum_params}
    fill = lambda name, *shape: reference_rules.fill(f"predictor.{name}", shape)
    norm = lambda layer, width: {
        ours: fill(f"{layer}.running_{ours}", width) for ours in ("mean", "var")
    }
    first = {"dense": {"kernel": fill("0.weight", 32, 16).T}}
    first["norm"] = {"scale": fill("1.weight", 32), "bias": fill("1.bias", 32)}
    head = {
        "params": {"layer1": first, "layer2": {"dense": {"kernel": fill("3.weight", 16, 32).T}}},
        "batch_stats": {"layer1": {"norm": norm("1", 32)}, "layer2": {"norm": norm("4", 16)}},
    }

    apply = functools.partial(network.apply, train=True, mutable="batch_stats")
    spec = ENCODERS["mocov3"]
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    views = [
        np.stack([reference_rules.image(104 + n, 64, 64, stream) for n in range(8)])
        for stream in (7, 8)
    ]
    views = [(view - mean) / std for view in views]
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)

    def terms(variables, head):
        queries = []
        for view in views:
            outputs, updated = apply(variables, view)
            outputs, _ = predictor.apply(
                head, outputs["projection"], train=True, mutable="batch_stats"
            )
            queries.append(unit(outputs["prediction"]))
            variables = {**variables, **updated}
        keys = [unit(apply(momentum, view)[0]["projection"]) for view in views]
        pairs = ((queries[0], keys[1]), (queries[1], keys[0]))
        losses = [-0.4 * jnp.diag(jax.nn.log_softmax(q @ k.T / 0.2)).mean() for q, k in pairs]
        return sum(losses), (jnp.stack(losses), variables)

    base = variables["base_encoder"]
    loss = lambda p, h: terms({**base, "params": p}, {**head, "params": h})
    gradients, (losses, moved) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        base["params"], head["params"]
    )
    base_grad, head_grad = gradients
    np.testing.assert_allclose(losses, reference["clean_loss_terms"], rtol=2e-5)
    statistics = moved["batch_stats"]["head"]["layer1"]["norm"]
    for what, name in (("mean", "running_mean"), ("var", "running_var")):
        expected = reference[f"clean_after_forward.base_encoder.head.1.{name}"]
        tolerance = 1e-5 * abs(expected).max()
        np.testing.assert_allclose(statistics[what], expected, rtol=0, atol=tolerance)
    for actual, name in (
        (base_grad["backbone"]["class_token"], "base_encoder.cls_token"),
        (head_grad["layer1"]["norm"]["scale"], "predictor.1.weight"),
    ):
        expected = reference[f"clean_grad.{name}"].ravel()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4 * abs(expected).max())


# SimCLR v2


def simclr_shapes(stage_sizes, width, selective):
    """Keys and shapes of a converted SimCLR v2 file."""
    shapes = {}

    def layer(conv, norm, out, inputs, size):
        shapes[f"{conv}.weight"] = (out, inputs, size, size)
        shapes.update(norm_shapes(f"{norm}.0", out))

    if selective:
        half = width // 2
        for index, (out, inputs) in enumerate(((half, 3), (half, half), (width, half))):
            layer(f"net.0.{2 * index}", f"net.0.{2 * index + 1}", out, inputs, 3)
    else:
        layer("net.0.0", "net.0.1", width, 3, 7)
    inputs = width
    for stage, num_blocks in enumerate(stage_sizes, start=1):
        c = width * 2 ** (stage - 1)
        for block in range(num_blocks):
            name = f"net.{stage}.blocks.{block}"
            if block == 0:
                shortcut = f"{name}.projection.shortcut{'.2' if selective else ''}"
                layer(shortcut, f"{name}.projection.bn", 4 * c, inputs, 1)
            layer(f"{name}.net.0", f"{name}.net.1", c, inputs, 1)
            if selective:
                layer(f"{name}.net.2.main_conv.0", f"{name}.net.2.main_conv.1", 2 * c, c, 3)
                mixing, squeezed = f"{name}.net.2.mixing_conv", max(c // 16, 32)
                layer(f"{mixing}.0", f"{mixing}.1", squeezed, c, 1)
                shapes[f"{mixing}.2.weight"] = (2 * c, squeezed, 1, 1)
                layer(f"{name}.net.3", f"{name}.net.4", 4 * c, c, 1)
            else:
                layer(f"{name}.net.2", f"{name}.net.3", c, c, 3)
                layer(f"{name}.net.4", f"{name}.net.5", 4 * c, c, 1)
            inputs = 4 * c
    for index, out in ((0, inputs), (3, inputs), (6, 128)):
        shapes[f"layers.{index}.weight"] = (out, inputs)
        shapes |= norm_shapes(f"layers.{index + 1}", out)
    return shapes


def simclr_twin(p, x, stage_sizes, selective):
    from torch.nn import functional as F

    def conv_norm(conv, norm, x, stride=1):
        kernel = p[f"{conv}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        return batch_norm(p, f"{norm}.0", x)

    for index in (0, 2, 4) if selective else (0,):
        x = conv_norm(f"net.0.{index}", f"net.0.{index + 1}", x, 2 if index == 0 else 1).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, num_blocks in enumerate(stage_sizes, start=1):
        for block in range(num_blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"net.{stage}.blocks.{block}"
            y = conv_norm(f"{name}.net.0", f"{name}.net.1", x).relu()
            if selective:
                mixing = f"{name}.net.2.mixing_conv"
                y = conv_norm(f"{name}.net.2.main_conv.0", f"{name}.net.2.main_conv.1", y, stride)
                first, second = y.relu().chunk(2, 1)
                context = (first + second).mean((2, 3), keepdim=True)
                context = conv_norm(f"{mixing}.0", f"{mixing}.1", context).relu()
                logits = F.conv2d(context, p[f"{mixing}.2.weight"]).unflatten(1, (2, -1))
                weight = logits.softmax(1)
                y = first * weight[:, 0] + second * weight[:, 1]
            else:
                y = conv_norm(f"{name}.net.2", f"{name}.net.3", y, stride).relu()
            last = 3 if selective else 4
            y = conv_norm(f"{name}.net.{last}", f"{name}.net.{last + 1}", y)
            if block == 0 and selective:
                x = F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, stride)
                x = conv_norm(f"{name}.projection.shortcut.2", f"{name}.projection.bn", x)
            elif block == 0:
                x = conv_norm(f"{name}.projection.shortcut", f"{name}.projection.bn", x, stride)
            x = (x + y).relu()
    x = x.mean((2, 3))
    for layer in (0, 3, 6):
        x = batch_norm(p, f"layers.{layer + 1}", F.linear(x, p[f"layers.{layer}.weight"]))
        x = x.relu() if layer < 6 else x
    return x


@pytest.mark.parametrize("selective", [False, True])
def test_simclr_equals_a_torch_twin(selective):
    stages = (1, 2)

    def network(folded):
        backbone = SimCLRResNet(stages, 8, selective, folded=folded)
        return Network(backbone, heads.simclrv2_projector(64, folded=folded))

    spec = tiny("simclrv2", network, (32, 48))
    twin = functools.partial(simclr_twin, stage_sizes=stages, selective=selective)
    agree(spec, fill_shapes(simclr_shapes(stages, 8, selective)), twin, output="projection")


@pytest.mark.parametrize(
    ("stages", "factor", "selective"),
    [((3, 4, 6, 3), 1, True), ((3, 4, 23, 3), 2, False), ((3, 8, 36, 3), 3, True)],
)
def test_simclr_variants_are_recognised_by_their_tensors(stages, factor, selective):
    shapes = simclr_shapes(stages, 64 * factor, selective) | {"fc.weight": (1000, 2048 * factor)}
    tensors = {key: np.broadcast_to(np.float32(1), shape) for key, shape in shapes.items()}
    config = mapping.map_tensors(tensors, ENCODERS["simclrv2"]).config
    assert config == {"stage_sizes": stages, "width": 64 * factor, "selective": selective}


# AMDIM

_AMDIM_UNITS = ((2, 2, 4, 2), (3, 4, 4, 2), (4, 8, 2, 2), (6, 8, 3, 1), (7, 8, 3, 1))


def amdim_shapes(width, dimension, depth):
    prefix = "encoder.module.layer_list"
    shapes = {f"{prefix}.0.conv.weight": (width, 3, 5, 5), f"{prefix}.0.conv.bias": (width,)}
    shapes |= {f"{prefix}.1.conv.weight": (width, width, 3, 3), f"{prefix}.1.conv.bias": (width,)}
    inputs = width
    for index, factor, size, _ in _AMDIM_UNITS:
        out = factor * width
        for unit in range(depth):
            name, k = f"{prefix}.{index}.layer_list.{unit}", size if unit == 0 else 1
            shapes[f"{name}.conv1.weight"] = (out, inputs, k, k)
            shapes[f"{name}.conv2.weight"] = (out, out, 1, 1)
            shapes |= norm_shapes(f"{name}.bn1.bn", out)
            inputs = out
    shapes[f"{prefix}.8.conv1.weight"] = (dimension, inputs, 3, 3)
    shapes[f"{prefix}.8.conv2.weight"] = (dimension, dimension, 1, 1)
    return shapes | norm_shapes(f"{prefix}.9.bn", dimension)


def amdim_twin(p, x, depth):
    from torch.nn import functional as F

    prefix = "encoder.module.layer_list"

    def unit(name, x, size, stride):
        y = F.conv2d(x, p[f"{name}.conv1.weight"], stride=stride).relu()
        y = F.conv2d(y, p[f"{name}.conv2.weight"])
        x = F.avg_pool2d(x, size, stride)
        return y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))

    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    for index in range(2):
        name = f"{prefix}.{index}.conv"
        x = F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=2 - index).relu()
    for index, _, size, stride in _AMDIM_UNITS:
        for number in range(depth):
            first = (size, stride) if number == 0 else (1, 1)
            x = unit(f"{prefix}.{index}.layer_list.{number}", x, *first)
    x = unit(f"{prefix}.8", x, 3, 1)
    return batch_norm(p, f"{prefix}.9.bn", x).mean((2, 3))


def test_amdim_equals_a_torch_twin():
    # The last unit widens too, which the published one does not.
    spec = tiny("amdim", lambda folded: Network(AMDIM(4, 40, 2), heads.NoHead()), (160, 176))
    agree(spec, fill_shapes(amdim_shapes(4, 40, 2)), functools.partial(amdim_twin, depth=2))


def test_amdim_is_configured_by_its_tensors_and_refuses_hidden_batch_norms():
    shapes = amdim_shapes(64, 512, 3)
    tensors = {key: np.broadcast_to(np.float32(1), shape) for key, shape in shapes.items()}
    contents = {"hyperparams": {"encoder_size": 128, "use_bn": False}}
    published = mapping.map_tensors(tensors, ENCODERS["amdim"], contents)
    assert published.config == {"width": 64, "dimension": 512, "depth": 3}
    contents["hyperparams"]["use_bn"] = True
    with pytest.raises(ValueError, match="Expected an AMDIM file with use_bn=False, got True"):
        mapping.map_tensors(tensors, ENCODERS["amdim"], contents)


# Heads


def mlp_twin(p, x, layers, bias):
    """Linear layers `layers` of (linear, norm or None), ReLU between them."""
    from torch.nn import functional as F

    for linear, norm in layers:
        x = F.linear(x, p[f"{linear}.weight"].flatten(1), p[f"{linear}.bias"] if bias else None)
        x = x if norm is None else batch_norm(p, norm, x)
        x = x.relu() if (linear, norm) != layers[-1] else x
    return x


@pytest.mark.parametrize(
    ("head", "output", "norms"),
    [
        (heads.mocov3_projector(5, 3), "projection", ("affine", "affine", "plain")),
        (heads.mocov3_predictor(5, 3), "prediction", ("affine", "plain")),
        (heads.simsiam_projector(6), "projection", ("affine", "affine", "plain")),
        (heads.simsiam_predictor(5, 6), "prediction", ("affine", None)),
        (heads.simclrv2_projector(6, 3), "projection", ("affine", "affine", "affine")),
        (heads.pixpro_projector(5, 3), "projection", ("affine", None)),
    ],
)
def test_heads_equal_a_numpy_twin(head, output, norms):
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    shapes = jax.eval_shape(head.init, jax.random.key(0), x)
    draw = lambda path, leaf: reference_rules.fill(
        {"var": "running_var", "scale": "running_var", "kernel": "a.k"}.get(path[-1].key, "bias"),
        leaf.shape,
    )
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    y = x.astype(np.float64)
    for index, norm in enumerate(norms, start=1):
        layer = variables["params"][f"layer{index}"]
        dense = layer.get("dense", layer)
        y = y @ dense["kernel"] + dense.get("bias", 0)
        if norm:
            statistics = variables["batch_stats"][f"layer{index}"]["norm"]
            assert ("norm" in layer) == (norm == "affine")
            affine = layer.get("norm", {"scale": 1, "bias": 0})
            y = (y - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
            y = y * affine["scale"] + affine["bias"]
        y = y if index == len(norms) else np.maximum(y, 0)
    folded = head.clone(folded=True)
    for network, used in ((head, variables), (folded, fold_batch_norm(variables))):
        actual = jax.jit(network.apply)(used, x)
        assert set(actual) == {"hidden", output}
        np.testing.assert_allclose(actual[output], y, rtol=0, atol=1e-5 * abs(y).max())


def test_pixpro_projects_every_position_and_averages():
    def network(folded):
        backbone = ResNet((1,), Bottleneck, width=4, folded=folded)
        return heads.PositionwiseNetwork(backbone, heads.pixpro_projector(8, 6, folded=folded))

    c, block = 4, "module.encoder.layer1.0"
    shapes = {"module.encoder.conv1.weight": (c, 3, 7, 7)} | norm_shapes("module.encoder.bn1", c)
    for i, (o, k) in enumerate(((c, 1), (c, 3), (4 * c, 1)), start=1):
        shapes |= {f"{block}.conv{i}.weight": (o, c, k, k)} | norm_shapes(f"{block}.bn{i}", o)
    shapes |= {f"{block}.downsample.0.weight": (4 * c, c, 1, 1)}
    shapes |= norm_shapes(f"{block}.downsample.1", 4 * c) | norm_shapes("module.projector.bn1", 8)
    for name, o, i in (("linear1", 8, 4 * c), ("linear2", 6, 8)):
        name = f"module.projector.{name}"
        shapes |= {f"{name}.weight": (o, i, 1, 1), f"{name}.bias": (o,)}

    def twin(p, x):
        from torch.nn import functional as F

        p = {key.removeprefix("module."): tensor for key, tensor in p.items()}
        conv = lambda conv, norm, x, **settings: batch_norm(
            p, norm, F.conv2d(x, p[f"{conv}.weight"], **settings)
        )
        x = conv("encoder.conv1", "encoder.bn1", x, stride=2, padding=3).relu()
        x, name = F.max_pool2d(x, 3, 2, 1), "encoder.layer1.0"
        y = conv(f"{name}.conv1", f"{name}.bn1", x).relu()
        y = conv(f"{name}.conv2", f"{name}.bn2", y, padding=1).relu()
        x = conv(f"{name}.downsample.0", f"{name}.downsample.1", x)
        x = (conv(f"{name}.conv3", f"{name}.bn3", y) + x).relu()
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        layers = (("projector.linear1", "projector.bn1"), ("projector.linear2", None))
        return mlp_twin(p, rows, layers, bias=True).unflatten(0, (len(x), -1)).mean(1)

    agree(tiny("pixpro", network, (32, 40)), fill_shapes(shapes), twin, output="projection")


def test_representations_have_the_published_dimensions():
    expected = {
        "mocov3": {"backbone": 384, "hidden": 4096, "projection": 256},
        "moco_nonsem": {"backbone": 2048, "projection": 1000},
        "simsiam": {"backbone": 2048, "hidden": 2048, "projection": 2048},
        "pixpro": {"backbone": 2048, "hidden": 4096, "projection": 256},
        "simclrv2": {"backbone": 2048, "hidden": 2048, "projection": 128},
        "amdim": {"backbone": 2048, "projection": 2048},
        "mae": {"backbone": 1024, "projection": 1024},
    }
    for name, dimensions in expected.items():
        spec = ENCODERS[name]
        network = spec.network(folded=True)
        images = jax.ShapeDtypeStruct((1, *spec.input_size, 3), jnp.bfloat16)
        variables = jax.eval_shape(network.init, jax.random.key(0), images)
        half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), variables)
        outputs = jax.eval_shape(network.apply, half, images)
        assert {k: v.shape[1] for k, v in outputs.items()} == dimensions, name
        # Computed in the dtype of the input throughout, also with bfloat16 parameters.
        assert {v.dtype for v in outputs.values()} == {jnp.dtype("bfloat16")}, name
