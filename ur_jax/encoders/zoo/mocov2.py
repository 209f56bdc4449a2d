"""MoCo v2 (Chen et al. 2020), and the files fine-tuned from it."""

from __future__ import annotations

from ur_jax.encoders.networks.heads import MocoV2Head
from ur_jax.encoders.networks.layers import NormConfig
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.resnet import resnet50
from ur_jax.encoders.zoo.rules import RESNET50_RULES, dense_rules
from ur_jax.encoders.zoo.spec import EncoderSpec, TrainingPart, register

RULES = (*RESNET50_RULES, *dense_rules(r"fc\.(\d)", r"head/fc\1"))


def network(folded: bool, group_size: int | None = None) -> Network:
    """MoCo v2's ResNet-50 with its head."""
    norm = NormConfig(group_size=group_size)
    return Network(resnet50(folded=folded, norm=norm), MocoV2Head())


register(
    EncoderSpec(
        name="mocov2",
        title="ResNet-50",
        reference="Chen et al. 2020, arXiv:2003.04297",
        url="https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_200ep/",
        file_name="moco_v2_200ep_pretrain.pth.tar",
        licence="CC BY-NC 4.0",
        network=network,
        rules=RULES,
        paper="skip_hidden",
        prefix="module.encoder_q.",
        ignored=(r"module\.encoder_k\..*", r"module\.queue(_ptr)?"),
        parts=(
            TrainingPart("momentum", "module.encoder_k.", lambda **kw: network(False, **kw), RULES),
        ),
    )
)
