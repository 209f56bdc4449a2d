"""Encoders of PyTorch, tuned here and written back under the keys of their state dicts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ur_jax
from ur_jax import cli, training
from ur_jax.attacks import AttackConfig, u_pgd
from ur_jax.encoders import mapping, torch_files, write_weights
from ur_jax.encoders.bridge import from_torch, state_dict
from ur_jax.encoders.zoo.rules import conv_norm_rules, dense_rules, vit_rules
from ur_jax.encoders.zoo.spec import EncoderSpec
from ur_jax.errors import UserError

torch = pytest.importorskip("torch")
nn = torch.nn
SIZE = (16, 16)


class Block(nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample = nn.Identity()
        if stride > 1:
            shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-18's kind, of two stages."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4, 1))
        self.layer2 = nn.Sequential(Block(4, 8, 2))
        self.fc = nn.Linear(8, 6)
        self.unused = nn.Linear(8, 3)

    def forward(self, x):
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class ViT(nn.Module):
    """Class token, learned positions, two layers, tied weights."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.token, self.positions = (nn.Parameter(torch.randn(1, n, 8) / 3) for n in (1, 5))
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.second(torch.tanh(self.first(self.layers(x)[:, 0])))


def make(kind):
    torch.manual_seed(0)
    module = kind().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.8, 1.2)
            part.num_batches_tracked.fill_(7)
    return module


def _tuned(encoder, images, method):
    """The encoder after some steps."""
    optimizer = training.adamw(lambda step: 1e-3, weight_decay=0.0)
    attack = training.Adversary("loss", AttackConfig(eps=0.1, step_size=0.05, num_steps=2))
    step = jax.jit(functools.partial(training.train_step, method, optimizer, attack))
    state = training.init_state(method, encoder.params, optimizer, jax.random.key(0))
    for i in range(30):
        state, metrics, _ = step(state, training.Views(images, images), jax.random.key(i))
        assert metrics["skipped"] == 0
    return encoder.replace(params=method.encoder_variables(state))


@pytest.mark.parametrize("kind, way", [(ResNet, training.Lore), (ViT, training.Fare)])
def test_a_network_of_pytorch_is_tuned_and_used_where_it_came_from(kind, way, tmp_path):
    images = jnp.asarray(np.random.default_rng(0).random((8, *SIZE, 3), np.float32))
    encoder = from_torch(make(kind), input_size=SIZE, fold=False, check=False)
    tuned = _tuned(encoder, images, way.of(encoder))
    ur_jax.save_encoder(tmp_path / "tuned", tuned)
    command = cli.find("export-weights")
    words = ["--encoder", str(tmp_path / "tuned"), "--out", str(tmp_path / "w.safetensors")]
    command.main(cli.parse(command, words))

    module, original = make(kind), make(kind).state_dict()
    read = torch_files.read_tensors(tmp_path / "w.safetensors").tensors
    assert {k: (v.shape, str(v.dtype)) for k, v in read.items()} == {
        k: (tuple(v.shape), str(v.numpy().dtype)) for k, v in original.items()
    }
    module.load_state_dict({key: torch.from_numpy(value) for key, value in read.items()})
    with torch.no_grad():
        theirs = module(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).numpy()
    ours = jax.jit(lambda e, x: e(x))
    np.testing.assert_allclose(theirs, ours(tuned, images), atol=1e-5)
    # What training leaves alone: statistics, counts, and layers that the output does not need.
    still = [k for k in read if "running" in k or "num_batches" in k or "unused" in k]
    assert all(np.array_equal(read[key], original[key]) for key in still)
    moved = {k for k in read if not np.array_equal(read[k], original[k])}
    assert moved == {k for k in read if k not in still}

    attack = AttackConfig(eps=0.1, step_size=0.02, num_steps=5)

    def distance(encoder):
        found = u_pgd(encoder, images, jax.random.key(0), config=attack).representations
        return np.median(np.linalg.norm(found - ours(encoder, images), axis=1))

    assert distance(tuned) < 0.8 * distance(encoder)


def test_what_cannot_be_written_back_is_said_in_one_line(tmp_path):
    folded = from_torch(make(ResNet), input_size=SIZE, check=False)
    with pytest.raises(UserError, match="not those of a PyTorch module: BatchNorm is folded"):
        state_dict(folded)
    with pytest.raises(UserError, match="'demo' was made here"):
        write_weights.exported("demo")
    with pytest.raises(UserError, match="--out with .safetensors or .pt"):
        write_weights.Config("demo", tmp_path / "weights.bin")


def test_a_published_layout_is_written_back_as_it_was():
    rng = np.random.default_rng(0)
    rules = (*vit_rules(), *conv_norm_rules("conv1", "bn1", "backbone/stem"))
    rules += dense_rules(r"fc\.(\d)", r"head/fc\1")
    shapes = {
        "cls_token": (1, 1, 6), "pos_embed": (1, 5, 6), "patch_embed.proj.weight": (6, 3, 2, 2),
        "blocks.3.attn.qkv.weight": (18, 6), "conv1.weight": (4, 3, 3, 5), "fc.0.weight": (2, 6),
        "bn1.running_var": (4,), "other": (2,),
    }  # fmt: skip
    file = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    spec = EncoderSpec("toy", "", "", "", "", "", lambda folded: None, rules, "")  # pyright: ignore
    flat = {
        path: mapping._arrange(file[key], rule.layout)
        for key in file
        for rule, path in mapping._matches(key, spec)
    }
    assert len(flat) == 7
    from flax import traverse_util

    variables = traverse_util.unflatten_dict({k: v + 1 for k, v in flat.items()}, sep="/")
    written = mapping.unmapped(variables, spec, file)
    for key, array in file.items():
        np.testing.assert_array_equal(written[key], array + (key != "other"))
    with pytest.raises(UserError, match="no tensor for 1 of the variables of 'toy'"):
        mapping.unmapped(variables, spec, {k: v for k, v in file.items() if k != "cls_token"})
