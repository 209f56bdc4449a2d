"""Training steps against the reference and a float64 twin, and what devices must not change."""

from __future__ import annotations

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_rules
import torch
from flax import traverse_util

from ur_jax import devices, training
from ur_jax.attacks import AttackConfig, u_pgd
from ur_jax.encoders import from_fn, mapping
from ur_jax.encoders.networks import heads
from ur_jax.encoders.networks.layers import Dense, DenseNorm, NormConfig
from ur_jax.encoders.networks.network import Network, NetworkFn
from ur_jax.encoders.networks.resnet import resnet18
from ur_jax.encoders.networks.vit import ViT, sincos_positions
from ur_jax.encoders.zoo import ENCODERS, mocov3
from ur_jax.encoders.zoo.rules import dense_rules, resnet_rules
from ur_jax.encoders.zoo.spec import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from ur_jax.training import losses, step

SPEC = EncoderSpec(
    name="golden",
    title="ResNet-18",
    reference="",
    url="",
    file_name="",
    licence="",
    network=lambda folded: Network(resnet18(folded=folded), heads.MocoV2Head(512, 16)),
    rules=(*resnet_rules((2, 2, 2, 2)), *dense_rules(r"fc\.(\d)", r"head/fc\1")),
    paper="projection",
    input_size=(32, 32),
)


def _resnet18_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's ResNet-18 with the MLP head."""
    shapes = {"conv1.weight": (64, 3, 7, 7)}

    def norm(key, width):
        for last in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{key}.{last}"] = (width,)

    norm("bn1", 64)
    width_in = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            key = f"layer{stage}.{block}"
            shapes[f"{key}.conv1.weight"] = (width, width_in, 3, 3)
            shapes[f"{key}.conv2.weight"] = (width, width, 3, 3)
            norm(f"{key}.bn1", width)
            norm(f"{key}.bn2", width)
            if width_in != width:
                shapes[f"{key}.downsample.0.weight"] = (width, width_in, 1, 1)
                norm(f"{key}.downsample.1", width)
            width_in = width
    shapes |= {"fc.0.weight": (512, 512), "fc.0.bias": (512,)}
    return shapes | {"fc.2.weight": (16, 512), "fc.2.bias": (16,)}


def _variables(name: str):
    """Variables of encoder_q or encoder_k by the fill rule."""
    shapes = _resnet18_shapes()
    tensors = {key: reference_rules.fill(f"{name}.{key}", shape) for key, shape in shapes.items()}
    return jax.tree.map(jnp.asarray, mapping.map_tensors(tensors, SPEC).variables)


def _close(actual, expected, share):
    """Asserts max|a - b| <= share * max|b|."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= share * np.abs(expected).max()


def _golden_images(size):
    """View 1, view 2 and the attacked view 1 of the reference's training steps."""
    first, second = (
        np.stack([reference_rules.image(104 + n, size, size, stream) for n in range(8)])
        for stream in (7, 8)
    )
    sign = 2 * np.random.default_rng([0, 19]).integers(0, 2, first.shape) - 1
    attacked = np.clip(first + np.float32(0.05) * sign.astype(np.float32), 0, 1)
    return training.Views(jnp.asarray(first), jnp.asarray(second)), jnp.asarray(attacked)


def _at(tree, path):
    """A leaf or subtree by its "/"-separated path."""
    return functools.reduce(lambda node, part: node[part], path.split("/"), tree)


def _forward(method, views, attacked):
    """A jitted (state) -> (mean loss, (batch_stats, target, logits)), gradients by its params."""
    rows = jnp.arange(len(views.first), dtype=jnp.int32)
    apart = lambda fn, *trees: fn(*trees)

    def loss(params, state):
        target, targets = method.targets(state, views, jax.random.key(1), apart)
        if attacked is not None:
            target, targets = method.attacked_targets(target, targets, attacked, apart)
        variables = {"params": params, "batch_stats": state.batch_stats}
        part = step.Part(rows, views, attacked)
        losses, batch_stats, _ = method.losses(variables, target, targets, part)
        return losses.mean(), (batch_stats, method.finish(target, targets), targets)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _two_steps(method, optimizer, state, views, attacked):
    """The reference's scenario: forward, step, forward again; (loss, aux, grads), after, loss."""
    forward = _forward(method, views, attacked)
    (loss, (batch_stats, target, targets)), grads = forward(state.params, state)

    @jax.jit
    def moved(grads, opt_state, params):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = moved(grads, state.opt_state, state.params)
    after = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        target=target,
        opt_state=opt_state,
    )
    (second_loss, _), _ = forward(after.params, after)
    return loss, targets, grads, after, second_loss


@pytest.mark.parametrize("scenario", ["clean", "attacked"])
def test_mocov2_step_equals_the_reference(golden, scenario):
    expected = golden("training_mocov2.npz")
    query, key = _variables("encoder_q"), _variables("encoder_k")
    queue = np.random.default_rng([0, 14]).standard_normal((16, 64))
    queue = (queue / np.linalg.norm(queue, axis=0)).astype(np.float32).T
    method = training.MocoV2(
        SPEC.network(folded=False),
        IMAGENET_MEAN,
        IMAGENET_STD,
        dimension=16,
        queue_size=64,
        temperature=0.2,
        momentum=0.999,
    )
    optimizer = training.sgd(lambda step: 0.03)
    state = training.init_state(method, query, optimizer, jax.random.key(0), {"momentum": key})
    position = jnp.asarray({"clean": 0, "attacked": 56}[scenario], jnp.int32)
    state.target.update(queue=jnp.asarray(queue), position=position)
    views, attacked = _golden_images(32)
    attacked = attacked if scenario == "attacked" else None
    loss, keys, grads, after, second_loss = _two_steps(method, optimizer, state, views, attacked)

    np.testing.assert_allclose(loss, expected[f"{scenario}_loss"], rtol=5e-5)
    np.testing.assert_allclose(second_loss, expected[f"{scenario}_second_loss"], rtol=1e-3)
    _close(after.target["queue"].T, expected[f"{scenario}_queue"], 1e-4)
    assert int(after.target["position"]) == int(expected[f"{scenario}_queue_ptr"][0])

    @jax.jit
    def logits(state, images):
        queries = losses.normalize(method.represent(state.variables, state.target, images))
        return losses.moco_logits(queries, keys, jnp.asarray(queue), temperature=0.2)

    rows = [logits(state, x) for x in (views.first, attacked) if x is not None]
    _close(np.concatenate(rows), expected[f"{scenario}_logits"], 2e-4)

    paths = {
        "conv1.weight": "backbone/stem/conv/kernel",
        "bn1.weight": "backbone/stem/norm/scale",
        "layer1.0.conv1.weight": "backbone/stage1_block1/conv1/conv/kernel",
        "layer2.0.downsample.0.weight": "backbone/stage2_block1/shortcut/conv/kernel",
        "layer3.1.bn2.bias": "backbone/stage3_block2/conv2/norm/bias",
        "layer4.1.conv2.weight": "backbone/stage4_block2/conv2/conv/kernel",
        "fc.0.weight": "head/fc0/kernel",
        "fc.2.weight": "head/fc2/kernel",
        "fc.2.bias": "head/fc2/bias",
    }
    names = [str(name).removeprefix("encoder_q.") for name in expected["grad_names"]]
    norms = [np.linalg.norm(_at(grads, paths[name])) for name in names]
    np.testing.assert_allclose(norms, expected[f"{scenario}_grad_l2"], rtol=2e-3)
    for name, share in (("bn1.weight", 2e-2), ("fc.2.bias", 2e-4)):
        _close(_at(grads, paths[name]), expected[f"{scenario}_grad.encoder_q.{name}"], share)
        was = expected[f"{scenario}_after_sgd.encoder_q.{name}"]
        _close(_at(after.params, paths[name]), was, 5e-4)
        was = expected[f"{scenario}_after_forward.encoder_k.{name}"]
        _close(_at(after.target["params"], paths[name]), was, 1e-5)
    for stats, name, path in (
        (after.batch_stats, "q.bn1", "backbone/stem/norm"),
        (after.batch_stats, "q.layer4.1.bn2", "backbone/stage4_block2/conv2/norm"),
        (after.target["batch_stats"], "k.bn1", "backbone/stem/norm"),
    ):
        for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
            was = expected[f"{scenario}_after_forward.encoder_{name}.{theirs}"]
            _close(_at(stats, f"{path}/{ours}"), was, 1e-5)


def _mocov3_variables(name, positions):
    """Variables of base_encoder, momentum_encoder or predictor by the fill rule."""
    shapes, dim = {}, 48
    if name == "predictor":
        shapes |= {"0.weight": (32, 16), "3.weight": (16, 32)}
        norms = {"1": (32, True), "4": (16, False)}
        rules = mocov3.PREDICTOR_RULES
    else:
        shapes |= {"cls_token": (1, 1, dim), "patch_embed.proj.weight": (dim, 3, 16, 16)}
        shapes |= {"patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)}
        for block in ("blocks.0", "blocks.1"):
            for norm in ("norm1", "norm2"):
                shapes |= {f"{block}.{norm}.{last}": (dim,) for last in ("weight", "bias")}
            sizes = {"attn.qkv": (144, 48), "attn.proj": (48, 48)}
            for layer, size in (sizes | {"mlp.fc1": (192, 48), "mlp.fc2": (48, 192)}).items():
                shapes |= {f"{block}.{layer}.weight": size, f"{block}.{layer}.bias": size[:1]}
        shapes |= {"head.0.weight": (32, 48), "head.3.weight": (32, 32), "head.6.weight": (16, 32)}
        norms = {"head.1": (32, True), "head.4": (32, True), "head.7": (16, False)}
        rules = mocov3.RULES
    for key, (width, affine) in norms.items():
        names = ("weight", "bias", "running_mean", "running_var")[0 if affine else 2 :]
        shapes |= {f"{key}.{last}": (width,) for last in names}
    tensors = {key: reference_rules.fill(f"{name}.{key}", shape) for key, shape in shapes.items()}
    if name != "predictor":
        tensors["pos_embed"] = positions
    flat = {}
    for key, tensor in tensors.items():
        for rule in rules:
            if match := re.fullmatch(rule.source, key):
                flat[match.expand(rule.destination)] = mapping._arrange(tensor, rule.layout)
    assert len(flat) == len(tensors)
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat, sep="/"))


@pytest.mark.parametrize("scenario", ["clean", "attacked"])
def test_mocov3_step_equals_the_reference(golden, scenario):
    expected = golden("training_mocov3.npz")
    network = Network(
        ViT(48, 2, 3, image_size=64, fixed_positions=True, freeze_patches=True),
        heads.mocov3_projector(32, 16),
    )
    base, momentum, predictor = (
        _mocov3_variables(name, expected["pos_embed"])
        for name in ("base_encoder", "momentum_encoder", "predictor")
    )
    ours = sincos_positions(4, 4, 48)
    np.testing.assert_allclose(ours, expected["pos_embed"][0], atol=1e-6)
    method = training.MocoV3(
        network, IMAGENET_MEAN, IMAGENET_STD, lambda step: 0.99, dimension=16, hidden=32
    )
    mask = training.trained_mask(ENCODERS["mocov3"].frozen)
    optimizer = training.adamw(lambda step: 7.5e-4, mask=mask)
    parts = {"momentum": momentum, "predictor": predictor}
    state = training.init_state(method, base, optimizer, jax.random.key(0), parts)
    views, attacked = _golden_images(64)
    attacked = attacked if scenario == "attacked" else None
    loss, _, grads, after, second_loss = _two_steps(method, optimizer, state, views, attacked)

    np.testing.assert_allclose(loss, expected[f"{scenario}_loss"], rtol=2e-5)
    np.testing.assert_allclose(second_loss, expected[f"{scenario}_second_loss"], rtol=1e-3)
    paths = {
        "base_encoder.cls_token": "encoder/backbone/class_token",
        "base_encoder.blocks.0.norm1.bias": "encoder/backbone/block0/norm1/bias",
        "base_encoder.blocks.0.attn.qkv.weight": "encoder/backbone/block0/qkv/kernel",
        "base_encoder.blocks.0.attn.qkv.bias": "encoder/backbone/block0/qkv/bias",
        "base_encoder.blocks.1.mlp.fc2.weight": "encoder/backbone/block1/contract/kernel",
        "base_encoder.norm.weight": "encoder/backbone/final_norm/scale",
        "base_encoder.head.0.weight": "encoder/head/layer1/dense/kernel",
        "base_encoder.head.6.weight": "encoder/head/layer3/dense/kernel",
        "predictor.0.weight": "predictor/layer1/dense/kernel",
        "predictor.1.weight": "predictor/layer1/norm/scale",
        "predictor.3.weight": "predictor/layer2/dense/kernel",
    }
    norms = [np.linalg.norm(_at(grads, paths[str(name)])) for name in expected["grad_names"]]
    np.testing.assert_allclose(norms, expected[f"{scenario}_grad_l2"], rtol=1e-4)
    for name in ("base_encoder.cls_token", "predictor.1.weight"):
        _close(_at(grads, paths[name]), expected[f"{scenario}_grad.{name}"].ravel(), 2e-4)
        was = expected[f"{scenario}_after_adamw.{name}"].ravel()
        _close(_at(after.params, paths[name]), was, 1e-5)
    for name, path in (
        ("norm.weight", "backbone/final_norm/scale"),
        ("head.1.weight", "head/layer1/norm/scale"),
        ("patch_embed.proj.bias", "backbone/patch_bias"),
    ):
        was = expected[f"{scenario}_after_forward.momentum_encoder.{name}"]
        _close(_at(after.target["params"], path), was, 1e-5)
    for stats, name, path in (
        (after.batch_stats, "base_encoder.head.1", "encoder/head/layer1/norm"),
        (after.target["batch_stats"], "momentum_encoder.head.1", "head/layer1/norm"),
        (after.batch_stats, "predictor.1", "predictor/layer1/norm"),
    ):
        for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
            was = expected[f"{scenario}_after_forward.{name}.{theirs}"]
            _close(_at(stats, f"{path}/{ours}"), was, 1e-5)
    # Neither gradient nor decay moves what the encoder holds constant.
    for name in ("patch_kernel", "patch_bias", "positions"):
        before = base["params"]["backbone"][name]
        np.testing.assert_array_equal(after.params["encoder"]["backbone"][name], before)


def test_queue_wraps_around():
    method = training.MocoV2(None, IMAGENET_MEAN, IMAGENET_STD, dimension=2, queue_size=6)
    target = {"queue": jnp.zeros((6, 2)), "position": jnp.asarray(4, jnp.int32)}
    target = method.finish(target, jnp.asarray([[1.0, 1], [2, 2], [3, 3]]))
    np.testing.assert_array_equal(target["queue"][:, 0], [3, 0, 0, 0, 1, 2])
    assert int(target["position"]) == 1


def test_schedules_equal_the_reference_table():
    v2 = training.cosine_schedule(0.03, steps_per_epoch=10, num_epochs=210, per_epoch=True)
    for epoch, rate in ((0, 0.03), (1, 0.02999832153), (105, 0.015), (199, 0.0002026410911)):
        np.testing.assert_allclose(v2(10 * epoch), rate, rtol=2e-4)
        np.testing.assert_allclose(v2(10 * epoch + 9), rate, rtol=2e-4)
    v3 = training.cosine_schedule(7.5e-4, steps_per_epoch=4, num_epochs=310, warmup_epochs=40)
    table = ((0, 0), (0.5, 9.375e-6), (20, 3.75e-4), (39.75, 0.0007453125), (40, 7.5e-4))
    for epoch, rate in (*table, (100.25, 0.0006615642793), (155, 0.0004614809515)):
        np.testing.assert_allclose(v3(int(4 * epoch)), rate, rtol=2e-4)
    momentum = training.momentum_schedule(0.99, steps_per_epoch=4, num_epochs=310)
    for epoch, value in ((0, 0.99), (39.75, 0.9904002301), (155, 0.995), (309, 0.9999997432)):
        np.testing.assert_allclose(momentum(int(4 * epoch)), value, rtol=1e-6)


def test_schedules_go_on_from_a_checkpoint():
    v2 = training.cosine_schedule(
        0.03, steps_per_epoch=10, num_epochs=210, start_epoch=200, per_epoch=True
    )
    table = ((0, 0.0001675376066), (1, 0.0001357535735), (5, 4.194304228e-05), (9, 1.678472846e-06))
    for epoch, rate in table:
        np.testing.assert_allclose(v2(10 * epoch + 9), rate, rtol=2e-4)
    where = dict(steps_per_epoch=4, num_epochs=310, start_epoch=300)
    v3 = training.cosine_schedule(7.5e-4, warmup_epochs=40, **where)
    momentum = training.momentum_schedule(0.99, **where)
    for step_number, rate, value in (
        (0, 2.535615847e-06, 0.9999743466),
        (2, 2.288645095e-06, 0.9999768459),
        (20, 6.344406483e-07, 0.9999935825),
    ):
        np.testing.assert_allclose(v3(step_number), rate, rtol=1e-3)
        np.testing.assert_allclose(momentum(step_number), value, rtol=1e-6)


def test_in_batch_info_nce_equals_float64():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 6, 5))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    logits = unit(q) @ unit(k).T / 0.2
    expected = 0.4 * (np.log(np.exp(logits).sum(1)) - np.diag(logits))
    rows = jnp.arange(6)
    ours = losses.in_batch_info_nce(jnp.float32(q), jnp.float32(k), rows, temperature=0.2)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


class Tiny(nn.Module):
    """Flattened pixels, a linear layer with BatchNorm, tanh, a linear layer."""

    group_size: int | None = 4

    @nn.compact
    def __call__(self, x, train=False):
        norm = NormConfig(group_size=self.group_size)
        x = DenseNorm(6, norm=norm, name="hidden")(x.reshape(len(x), -1), train)
        return {"projection": Dense(3, name="last")(jnp.tanh(x))}


class Twin:
    """`Tiny` in torch, float64, from our variables."""

    def __init__(self, variables, group_size=4):
        tensor = lambda x: torch.tensor(np.array(x), dtype=torch.float64)
        params, self.stats = jax.tree.map(tensor, (variables["params"], variables["batch_stats"]))
        hidden, last = params["hidden"], params["last"]
        self.group_size = group_size
        self.params = {
            "hidden/dense/kernel": hidden["dense"]["kernel"],
            "hidden/norm/scale": hidden["norm"]["scale"],
            "hidden/norm/bias": hidden["norm"]["bias"],
            "last/kernel": last["kernel"],
            "last/bias": last["bias"],
        }

    def __call__(self, x, train=True):
        p = self.params
        x = ((x - 0.4) / 0.5).reshape(len(x), -1) @ p["hidden/dense/kernel"]
        if train:
            x = x.reshape(-1, self.group_size, x.shape[-1])
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            x = x.reshape(-1, x.shape[-1])
        else:
            stats = self.stats["hidden"]["norm"]
            x = (x - stats["mean"]) / (stats["var"] + 1e-5).sqrt()
        x = torch.tanh(x * p["hidden/norm/scale"] + p["hidden/norm/bias"])
        return x @ p["last/kernel"] + p["last/bias"]


MEAN, STD = (0.4,) * 3, (0.5,) * 3
CONFIG = AttackConfig(eps=0.05, step_size=0.02, num_steps=3)


@pytest.fixture(scope="module")
def tiny():
    """Images of two views, and variables of `Tiny` that are not those of initialisation."""
    rng = np.random.default_rng(3)
    images = jnp.asarray(rng.random((2, 16, 4, 4, 3), np.float32))
    variables = Tiny().init(jax.random.key(0), images[0])
    noisy = lambda x: jnp.asarray(x + 0.2 * rng.random(x.shape), jnp.float32)
    return training.Views(*images), jax.tree.map(noisy, variables)


def _twin_attack(objective, images, key):
    """PGD in float64 from the documented random start: image i uses the key's fold i."""
    draw = lambda i: jax.random.uniform(jax.random.fold_in(key, i), (4, 4, 3), minval=-1.0)
    start = np.stack([draw(i) for i in range(len(images))])
    low = torch.tensor(np.maximum(images - 0.05, 0), dtype=torch.float64)
    high = torch.tensor(np.minimum(images + 0.05, 1), dtype=torch.float64)
    x = torch.tensor(np.asarray(images) + 0.05 * start, dtype=torch.float64)
    x = torch.minimum(torch.maximum(x, low), high)
    for _ in range(3):
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(x).sum(), x)
        x = torch.minimum(torch.maximum(x.detach() + 0.02 * gradient.sign(), low), high)
    return x


def _unit(x):
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", ["untargeted", "targeted", "loss"])
def test_attacked_mocov2_step_equals_a_float64_twin(tiny, kind):
    views, variables = tiny
    method = training.MocoV2(
        Tiny(), MEAN, STD, dimension=3, queue_size=32, temperature=0.2, momentum=0.9, group_size=4
    )
    optimizer = training.sgd(lambda step: 0.1, weight_decay=0.0, momentum=0.0)
    state = training.init_state(method, variables, optimizer, jax.random.key(5))
    key = jax.random.key(7)
    adversary = training.Adversary(kind, CONFIG)
    run = jax.jit(functools.partial(training.train_step, method, optimizer, adversary))
    after, metrics, samples = run(state, views, key)

    shuffle_key, attack_key = jax.random.split(key)
    order = np.array(jax.random.permutation(shuffle_key, 16))
    first, second = (torch.tensor(np.asarray(v), dtype=torch.float64) for v in views)
    twin = Twin(variables)
    keys = torch.empty(16, 3, dtype=torch.float64)
    keys[order] = _unit(twin(second[order]))  # the key encoder equals the query encoder here
    queue = torch.tensor(np.asarray(state.target["queue"]), dtype=torch.float64)

    def info_nce(x):
        queries = _unit(twin(x))
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / 0.2
        return torch.logsumexp(logits, 1) - logits[:, 0]

    clean, towards = twin(first), torch.roll(twin(second), 1, 0)
    objective = {
        "untargeted": lambda x: ((twin(x) - clean) ** 2).sum(1),
        "targeted": lambda x: -((twin(x) - towards) ** 2).sum(1),
        "loss": info_nce,
    }[kind]
    attacked = _twin_attack(objective, views.first, attack_key)
    np.testing.assert_allclose(samples.attacked, attacked[:8], atol=2e-6)
    for tensor in twin.params.values():
        tensor.requires_grad_(True)
    loss = torch.cat([info_nce(first), info_nce(attacked)]).mean()
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    loss.backward()
    for path, tensor in twin.params.items():
        expected = (tensor - 0.1 * tensor.grad).detach()
        np.testing.assert_allclose(_at(after.params, path), expected, rtol=1e-4, atol=1e-5)


def test_fare_step_equals_a_float64_twin(tiny):
    """The current weights differ from the original's, so that the two can't be confused."""
    views, variables = tiny
    encoder = from_fn(
        NetworkFn(Tiny(), "projection"), variables, input_size=(4, 4), mean=MEAN, std=STD
    )
    method = training.Fare.of(encoder)
    optimizer = training.sgd(lambda step: 0.01, weight_decay=0.0, momentum=0.0)
    state = training.init_state(method, encoder.params, optimizer, jax.random.key(5))
    state = state.replace(params=jax.tree.map(lambda x: 1.1 * x + 0.02, state.params))
    key = jax.random.key(7)
    adversary = training.Adversary("loss", CONFIG)
    run = jax.jit(functools.partial(training.train_step, method, optimizer, adversary))
    after, metrics, samples = run(state, views, key)

    first = torch.tensor(np.asarray(views.first), dtype=torch.float64)
    original = Twin(variables)(first, train=False)
    now = Twin({"params": state.params, "batch_stats": variables["batch_stats"]})
    distance = lambda x: ((now(x, train=False) - original) ** 2).sum(1)
    attacked = _twin_attack(distance, views.first, jax.random.split(key)[1])
    np.testing.assert_allclose(samples.attacked, attacked[:8], atol=2e-6)
    for tensor in now.params.values():
        tensor.requires_grad_(True)
    loss = distance(attacked).mean()
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    loss.backward()
    for path, tensor in now.params.items():
        expected = (tensor - 0.01 * tensor.grad).detach()
        np.testing.assert_allclose(_at(after.params, path), expected, rtol=1e-4, atol=1e-5)
    # What is not trained comes back as it was.
    for a, b in zip(
        jax.tree.leaves(method.encoder_variables(after)["batch_stats"]),
        jax.tree.leaves(variables["batch_stats"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def _method(name, variables):
    """A method on `Tiny`, and the variables it begins with."""
    shared = dict(dimension=3, group_size=8)
    network = Tiny(8)
    if name == "mocov2":
        return training.MocoV2(network, MEAN, STD, queue_size=32, **shared), variables
    if name == "mocov3":
        return training.MocoV3(network, MEAN, STD, lambda s: 0.9, hidden=5, **shared), variables
    fn = NetworkFn(network, "projection")
    encoder = from_fn(fn, variables, input_size=(4, 4), mean=MEAN, std=STD)
    return training.Fare.of(encoder), encoder.params


@pytest.mark.parametrize("name", ["mocov2", "mocov3", "fare"])
def test_devices_and_parts_change_nothing(tiny, name):
    """Five steps on one device, and on eight with gradients accumulated over two parts."""
    views, variables = tiny
    method, variables = _method(name, variables)
    optimizer = training.sgd(lambda step: 0.02)
    # In l2 steps are continuous; a sign would turn rounding at a gradient of 0 into a whole step.
    attack = AttackConfig(eps=0.3, step_size=0.1, num_steps=3, norm="l2")
    adversary = training.Adversary("loss" if name == "fare" else "targeted", attack)
    run = functools.partial(training.train_step, method, optimizer, adversary)
    mesh = devices.data_mesh()

    def train(num_parts, place_state=lambda x: x, place_batch=lambda x: x):
        step = jax.jit(functools.partial(run, num_parts=num_parts))
        state = place_state(training.init_state(method, variables, optimizer, jax.random.key(1)))
        for i in range(5):
            key = jax.random.fold_in(jax.random.key(2), i)
            state, metrics, samples = step(state, place_batch(views), key)
        return jax.tree.leaves((state, metrics, samples))

    one = train(1)
    eight = train(
        2, functools.partial(devices.replicate, mesh), functools.partial(devices.shard, mesh)
    )
    for a, b in zip(one, eight, strict=True):
        # A gradient that is 0 but for rounding, of a bias before a BatchNorm, is not compared to
        # itself but to entries of 0.01.
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-4 * max(np.abs(a).max(), 0.01)


def test_bfloat16_computes_with_float32_weights(tiny):
    views, variables = tiny
    optimizer = training.sgd(lambda step: 0.02)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        method, _ = _method("mocov2", variables)
        method = dataclasses.replace(method, dtype=dtype)
        state = training.init_state(method, variables, optimizer, jax.random.key(1))
        step = jax.jit(functools.partial(training.train_step, method, optimizer, None))
        state, metrics, _ = step(state, views, jax.random.key(2))
        losses[dtype] = float(metrics["loss"])
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    # bfloat16 has 8 bits: projections err by about 1 %, logits of at most 1 / 0.2 by a little more.
    assert 0 < abs(losses["bfloat16"] - losses["float32"]) < 0.05


def test_fare_makes_a_module_of_ones_own_robust(tiny):
    """U-PGD moves it less afterwards, and clean representations stay near the original's."""
    views, variables = tiny
    fn = NetworkFn(Tiny(None), "projection")
    encoder = from_fn(fn, variables, input_size=(4, 4), mean=MEAN, std=STD)
    method = training.Fare.of(encoder)
    optimizer = training.adamw(lambda step: 3e-3, weight_decay=0.0)
    adversary = training.Adversary("loss", CONFIG)
    step = jax.jit(functools.partial(training.train_step, method, optimizer, adversary))
    state = training.init_state(method, encoder.params, optimizer, jax.random.key(0))
    for i in range(150):
        state, _, _ = step(state, views, jax.random.fold_in(jax.random.key(1), i))
    tuned = encoder.replace(params=method.encoder_variables(state))

    def moved(encoder):
        attack = AttackConfig(eps=0.05, step_size=0.01, num_steps=10)
        result = u_pgd(encoder, views.first, jax.random.key(9), config=attack)
        return np.linalg.norm(result.representations - encoder(views.first), axis=1)

    before, after = moved(encoder), moved(tuned)
    assert np.median(after) < 0.7 * np.median(before), (before, after)
    drift = np.linalg.norm(tuned(views.first) - encoder(views.first), axis=1)
    # Stated bound: clean drift stays below the distance that an attack moved the original.
    assert np.median(drift) < np.median(before)


def whitened(params, images):
    """Patches over their deviation: the gradient of a root at 0 is infinite, times 0 NaN."""
    patches = images.reshape(len(images), 4, 4, 3)
    centred = patches - patches.mean((2, 3), keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean((2, 3)))
    scaled = centred / jnp.maximum(deviation, 1e-3)[..., None, None]
    return scaled.reshape(len(images), -1) @ params["w"] + params["offset"].astype(jnp.float32)


def test_fare_is_not_stopped_by_a_nan_in_the_gradient_of_black_bars():
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((48, 5)).astype(np.float32), "offset": np.int32(3)}
    encoder = from_fn(whitened, params, input_size=(4, 4))
    images = jnp.asarray(rng.random((8, 4, 4, 3), np.float32)).at[:4, :2].set(0.0)
    bars = jax.grad(lambda x: encoder(x).sum())(images)
    assert np.isnan(bars).sum() == 96  # and nothing else is
    method, optimizer = training.Fare.of(encoder), training.adamw(lambda step: 1e-3)
    state = training.init_state(method, encoder.params, optimizer, jax.random.key(0))
    adversary = training.Adversary("loss", CONFIG)
    step = jax.jit(functools.partial(training.train_step, method, optimizer, adversary))
    for i in range(2):
        state, metrics, samples = step(state, training.Views(images, images), jax.random.key(i))
        assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert np.isfinite(samples.attacked).all()
    tuned = method.encoder_variables(state)
    assert tuned["offset"] == 3 and not np.array_equal(tuned["w"], params["w"])


def test_bad_parts():
    with pytest.raises(ValueError, match="divisible by the 4 images"):
        step.check_parts(10, 4, 1)
    with pytest.raises(ValueError, match="num_parts"):
        step.check_parts(16, 4, 8)
    with pytest.raises(ValueError, match="group_size with num_parts"):
        step.check_parts(16, None, 2)
    with pytest.raises(ValueError, match="loss, targeted, untargeted"):
        training.Adversary("sideways")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature > 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"queue_size": 0}, "queue_size"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        training.MocoV2(None, IMAGENET_MEAN, IMAGENET_STD, **change)
