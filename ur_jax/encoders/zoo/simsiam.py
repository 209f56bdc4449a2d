"""SimSiam (Chen & He 2021)."""

from __future__ import annotations

from ur_jax.encoders.networks.heads import simsiam_projector
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.resnet import resnet50
from ur_jax.encoders.zoo.rules import RESNET50_RULES, projector_rules
from ur_jax.encoders.zoo.spec import EncoderSpec, register

register(
    EncoderSpec(
        name="simsiam",
        title="ResNet-50",
        reference="Chen & He 2021, arXiv:2011.10566",
        url="https://dl.fbaipublicfiles.com/simsiam/models/100ep-256bs/pretrain/",
        file_name="checkpoint_0099.pth.tar",
        licence="CC BY-NC 4.0",
        network=lambda folded: Network(resnet50(folded=folded), simsiam_projector(folded=folded)),
        rules=(*RESNET50_RULES, *projector_rules("fc", last_bias=True, affine=False)),
        paper="projection",
        prefix="module.encoder.",
        ignored=(r"module\.predictor\..*",),
    )
)
