"""MoCo v2 with non-semantic negatives (Ge et al. 2021)."""

from __future__ import annotations

from ur_jax.encoders.networks.heads import LinearHead
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.resnet import resnet50
from ur_jax.encoders.zoo.rules import RESNET50_RULES, dense_rules
from ur_jax.encoders.zoo.spec import EncoderSpec, register

register(
    EncoderSpec(
        name="moco_nonsem",
        title="ResNet-50",
        reference="Ge et al. 2021, arXiv:2110.14189",
        url="the authors' drive, linked from the paper's repository",
        file_name="mocov2_mocok16384_bs128_lr0.03_nonsem_noaug_16_72_nn1_alpha3_epoch200.pth.tar",
        licence="not stated (its repository: MIT)",
        network=lambda folded: Network(resnet50(folded=folded), LinearHead()),
        rules=(*RESNET50_RULES, *dense_rules("fc", "head/fc")),
        paper="projection",
        prefix="module.",
    )
)
