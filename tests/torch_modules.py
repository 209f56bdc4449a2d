"""Small networks of PyTorch for the bridge's tests, each with what one kind of network does."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Convolutional(nn.Module):
    """BatchNorm after and before convolutions, groups, a stem's pooling, squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        self.before = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 1), padding=(1, 0), groups=4, dilation=(1, 1))
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, 2, 1, groups=12)
        self.squeeze = nn.Conv2d(12, 12, 1)
        self.wide = nn.Conv2d(24, 16, (1, 3), stride=(1, 2), padding=(0, 1))
        self.head = nn.Sequential(nn.Linear(16, 10), nn.BatchNorm1d(10))

    def forward(self, x):
        x = F.relu(self.before(self.stem(x)))
        x = F.silu(self.norm(self.grouped(x)))
        x = self.depthwise(F.pad(x, (1, 0, 0, 1)))
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = torch.cat([x * gate, F.hardswish(x)], 1)
        x = F.avg_pool2d(self.wide(x), 2, 1, padding=1, count_include_pad=False)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Transformer(nn.Module):
    """A class token, positions that are interpolated, PyTorch's own layers, tied weights."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 16, 3, 3))
        layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.patches(x)
        positions = F.interpolate(self.positions, x.shape[2:], mode="bicubic", align_corners=False)
        x = (x + positions).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = self.layers(x)
        return {"tokens": x, "pooled": self.second(torch.tanh(self.first(x[:, 0])))}


class Written(nn.Module):
    """What others write out: LayerNorm over channels, GELU, RMSNorm in float32, attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(8))
        self.shift = nn.Parameter(torch.randn(8))
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.wider, self.narrower = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.randn(8))
        self.qkv = nn.Linear(8, 24, bias=False)

    def forward(self, x):
        x = self.stem(x)
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(spread + 1e-6)
        x = self.scale[:, None, None] * x + self.shift[:, None, None]
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.wider(y)
        y = y * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0)))
        x = x + (self.gamma * self.narrower(y)).permute(0, 3, 1, 2)
        x = x.flatten(2).transpose(1, 2)
        wide = x.to(torch.float32)
        x = x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1)
        return (attention @ v).transpose(1, 2).reshape(x.shape[0], -1, 8).mean(1)


class Windows(nn.Module):
    """Shifted windows with a mask and a table of relative positions, and rotary positions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.table = nn.Parameter(torch.randn(49, 2))
        axis = torch.arange(4)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None, :] + 3
        self.register_buffer("index", offset[0] * 7 + offset[1], persistent=False)
        part = torch.arange(8).ge(6).long()
        part = (
            (part[:, None] * 2 + part[None]).reshape(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(4, 16)
        )
        mask = (part[:, None] != part[:, :, None]).float() * -100.0
        self.register_buffer("mask", mask, persistent=False)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        x = torch.roll(self.stem(x).permute(0, 2, 3, 1), (-2, -2), (1, 2))
        b, h, w, c = x.shape
        x = x.view(b, 2, 4, 2, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b * 4, 16, c)
        q, k, v = self.qkv(x).view(b * 4, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        angles = torch.arange(16)[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        turned = lambda t: t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin
        bias = self.table[self.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)
        mask = (bias + self.mask[:, None]).repeat(b, 1, 1, 1)
        x = F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=mask)
        x = (
            x.transpose(1, 2)
            .reshape(b, 2, 2, 4, 4, c)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(b, h, w, c)
        )
        return F.normalize(torch.roll(x, (2, 2), (1, 2)).flatten(1, 2).amax(1), dim=-1)


class OneByOne(nn.Module):
    """It holds the batch size fast: a loop over images."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 5, 5)

    def forward(self, x):
        return torch.stack([self.layer(image[None]).amax((0, 2, 3)) for image in x])


CASES = {
    "convolutional": (Convolutional, None),
    "transformer": (Transformer, "pooled"),
    "written": (Written, None),
    "windows": (Windows, None),
    "one by one": (OneByOne, None),
}
"""{name: (class, output to take)}; each takes 32x32 pixels."""


def made(name: str) -> nn.Module:
    """The network of a name, in inference mode, with statistics and scales that count."""
    torch.manual_seed(0)
    module = CASES[name][0]().eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 1.5)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.3)
    return module
