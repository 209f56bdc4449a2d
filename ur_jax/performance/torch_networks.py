"""ResNet-50 and ViT in PyTorch, to compare with: state dicts have the published files' keys."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ur_jax.encoders.zoo.spec import EncoderSpec
from ur_jax.errors import UserError


def make_network(spec: EncoderSpec) -> nn.Module:
    """Returns the PyTorch twin of an encoder's backbone, with random weights, in inference mode.

    Raises:
      ValueError: if there is no twin of that encoder.
    """
    backbone = spec.network(folded=True).backbone
    kind = type(backbone).__name__
    if kind == "ResNet" and backbone.stage_sizes == (3, 4, 6, 3) and backbone.stem == "imagenet":
        network = ResNet50()
    elif kind == "ViT":
        network = ViT(backbone.dim, backbone.depth, backbone.num_heads, backbone.patch_size)
    else:
        raise UserError(f"There is no PyTorch twin of {spec.name!r}; compare resnet50 or mae.")
    return Normalised(network, spec.mean, spec.std).eval()


class Normalised(nn.Module):
    """A network of [0,1] images (B,3,H,W), whose normalisation is part of it."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        dtype = next(self.network.parameters()).dtype
        return self.network(((images - self.mean) / self.std).to(dtype)).float()


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 up to its pooled features."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        channels = 64
        for stage, num_blocks in enumerate((3, 4, 6, 3)):
            width, blocks = 64 * 2**stage, []
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(channels, width, stride))
                channels = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean((2, 3))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, width: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, features, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.shortcut = nn.Identity()
        if stride > 1 or width != features:
            conv = nn.Conv2d(width, features, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """An ImageNet-stem ResNet-18 up to its pooled features, with random weights."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [
        BasicBlock(width, features, 1 if width == features else 2)
        for width, features in zip(widths[:-1], widths[1:], strict=True)
    ]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *pool).eval()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        batch, length, dim = x.shape
        qkv = self.attn["qkv"](self.norm1(x))
        qkv = qkv.view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.attn["proj"](mixed.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer of 224x224 images up to its normalised class token."""

    def __init__(self, dim: int, depth: int, num_heads: int, patch_size: int):
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (224 // patch_size) ** 2, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]
