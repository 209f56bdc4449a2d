"""Training: MoCo v2's step against the reference, schedules, and what devices must not change."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_rules

from ur_jax import losses, sharding, training, weights
from ur_jax.encoders.heads import MocoV2Head
from ur_jax.encoders.layers import NormConfig
from ur_jax.encoders.networks import Network
from ur_jax.encoders.published import dense_rules, resnet_rules
from ur_jax.encoders.resnet import BasicBlock, ResNet, resnet18
from ur_jax.encoders.spec import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec

SPEC = EncoderSpec(
    name="golden",
    title="ResNet-18",
    reference="",
    url="",
    file_name="",
    licence="",
    network=lambda folded: Network(resnet18(folded=folded), MocoV2Head(512, 16)),
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
    return jax.tree.map(jnp.asarray, weights.map_tensors(tensors, SPEC).variables)


@pytest.fixture(scope="module")
def clean_step(golden):
    """One golden training step: (expected, method, state, views, optimizer)."""
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
    state = training.init_state(method, query, optimizer, jax.random.key(0))
    target = {**key, "queue": jnp.asarray(queue), "position": jnp.zeros((), jnp.int32)}
    state = state.replace(target=target)
    views = training.Views(
        *(
            jnp.asarray(np.stack([reference_rules.image(104 + n, 32, 32, s) for n in range(8)]))
            for s in (7, 8)
        )
    )
    return golden("training_mocov2.npz"), method, state, views, optimizer


def _close(actual, expected, share):
    """Asserts max|a - b| <= share * max|b|."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= share * np.abs(expected).max()


def test_mocov2_step_equals_the_reference(clean_step):
    expected, method, state, views, optimizer = clean_step
    draw = jax.random.key(1)

    @jax.jit
    def forward(params, state):
        target, keys = method.targets(state.target, state.params, views, draw)
        queries, _ = method._project(params, state.batch_stats, views.first)
        logits = losses.moco_logits(queries, keys, target["queue"], temperature=0.2)
        per_image, batch_stats, _ = method.loss(params, state.batch_stats, target, keys, views)
        return per_image.mean(), (logits, batch_stats, method.finish(target, keys))

    (loss, aux), grads = jax.value_and_grad(forward, has_aux=True)(state.params, state)
    logits, batch_stats, target = aux
    np.testing.assert_allclose(loss, expected["clean_loss"], rtol=5e-5)
    _close(logits, expected["clean_logits"], 2e-4)
    _close(target["queue"].T, expected["clean_queue"], 1e-4)
    assert int(target["position"]) == int(expected["clean_queue_ptr"][0]) == 8

    backbone, head = grads["backbone"], grads["head"]
    ours = {
        "conv1.weight": backbone["stem"]["conv"]["kernel"],
        "bn1.weight": backbone["stem"]["norm"]["scale"],
        "layer1.0.conv1.weight": backbone["stage1_block1"]["conv1"]["conv"]["kernel"],
        "layer2.0.downsample.0.weight": backbone["stage2_block1"]["shortcut"]["conv"]["kernel"],
        "layer3.1.bn2.bias": backbone["stage3_block2"]["conv2"]["norm"]["bias"],
        "layer4.1.conv2.weight": backbone["stage4_block2"]["conv2"]["conv"]["kernel"],
        "fc.0.weight": head["fc0"]["kernel"],
        "fc.2.weight": head["fc2"]["kernel"],
        "fc.2.bias": head["fc2"]["bias"],
    }
    norms = [
        np.linalg.norm(ours[str(name).removeprefix("encoder_q.")])
        for name in expected["grad_names"]
    ]
    np.testing.assert_allclose(norms, expected["clean_grad_l2"], rtol=2e-3)
    _close(ours["bn1.weight"], expected["clean_grad.encoder_q.bn1.weight"], 2e-2)
    _close(ours["fc.2.bias"], expected["clean_grad.encoder_q.fc.2.bias"], 2e-4)

    after = "clean_after_forward.encoder"
    for stats, name, node in (
        (batch_stats, f"{after}_q.bn1", ("stem",)),
        (batch_stats, f"{after}_q.layer4.1.bn2", ("stage4_block2", "conv2")),
        (target["batch_stats"], f"{after}_k.bn1", ("stem",)),
    ):
        norm = functools.reduce(lambda tree, part: tree[part], node, stats["backbone"])["norm"]
        _close(norm["mean"], expected[f"{name}.running_mean"], 1e-5)
        _close(norm["var"], expected[f"{name}.running_var"], 1e-5)
    moved = target["params"]
    _close(moved["backbone"]["stem"]["norm"]["scale"], expected[f"{after}_k.bn1.weight"], 1e-5)
    _close(moved["head"]["fc2"]["bias"], expected[f"{after}_k.fc.2.bias"], 1e-5)

    step = jax.jit(functools.partial(training.train_step, method, optimizer))
    state, metrics = step(state, views, draw)
    np.testing.assert_allclose(metrics["loss"], expected["clean_loss"], rtol=5e-5)
    after = "clean_after_sgd.encoder_q"
    _close(state.params["backbone"]["stem"]["norm"]["scale"], expected[f"{after}.bn1.weight"], 5e-4)
    _close(state.params["head"]["fc2"]["bias"], expected[f"{after}.fc.2.bias"], 5e-4)
    _, metrics = step(state, views, draw)
    np.testing.assert_allclose(metrics["loss"], expected["clean_second_loss"], rtol=1e-3)


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


def test_in_batch_info_nce_equals_float64():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 6, 5))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    logits = unit(q) @ unit(k).T / 0.2
    expected = 0.4 * (np.log(np.exp(logits).sum(1)) - np.diag(logits))
    ours = losses.in_batch_info_nce(jnp.float32(q), jnp.float32(k), temperature=0.2)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_one_device_equals_eight():
    network = Network(
        ResNet((1, 1), BasicBlock, width=4, stem="cifar", norm=NormConfig(group_size=2)),
        MocoV2Head(8, 6),
    )
    method = training.MocoV2(network, IMAGENET_MEAN, IMAGENET_STD, dimension=6, queue_size=32)
    images = jnp.asarray(np.random.default_rng(0).random((2, 16, 8, 8, 3), np.float32))
    variables = network.init(jax.random.key(0), images[0])
    optimizer = training.sgd(lambda step: 0.05)
    step = jax.jit(functools.partial(training.train_step, method, optimizer))

    def train(place_state, place_batch):
        state = place_state(training.init_state(method, variables, optimizer, jax.random.key(1)))
        for i in range(5):
            views = place_batch(training.Views(images[0], images[1]))
            state, metrics = step(state, views, jax.random.fold_in(jax.random.key(2), i))
        return jax.tree.leaves((state, metrics))

    mesh = sharding.data_mesh()
    one = train(lambda x: x, lambda x: x)
    eight = train(
        functools.partial(sharding.replicate, mesh), functools.partial(sharding.shard, mesh)
    )
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


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
