"""ResNet-50, trained with labels (He et al. 2016): torchvision's file."""

from __future__ import annotations

from ur_jax.encoders.networks.heads import LinearHead
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.resnet import resnet50
from ur_jax.encoders.zoo.rules import RESNET50_RULES, dense_rules
from ur_jax.encoders.zoo.spec import EncoderSpec, register

register(
    EncoderSpec(
        name="resnet50",
        title="ResNet-50, supervised",
        reference="He et al. 2016, arXiv:1512.03385",
        url="torchvision's model zoo (IMAGENET1K_V1)",
        file_name="resnet50-0676ba61.pth",
        licence="not stated (torchvision: BSD-3-Clause)",
        network=lambda folded: Network(resnet50(folded=folded), LinearHead()),
        rules=(*RESNET50_RULES, *dense_rules("fc", "head/fc")),
        paper="backbone",
        groups=(),
    )
)
