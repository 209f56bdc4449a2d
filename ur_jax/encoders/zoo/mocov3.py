"""MoCo v3's ViT-S (Chen et al. 2021), and the files fine-tuned from it."""

from __future__ import annotations

import flax.linen as nn

from ur_jax.encoders.networks import heads
from ur_jax.encoders.networks.layers import NormConfig
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.vit import vit_small
from ur_jax.encoders.zoo.rules import dense_norm_rules, projector_rules, vit_rules
from ur_jax.encoders.zoo.spec import EncoderSpec, TrainingPart, register

RULES = (*vit_rules(), *projector_rules("head", last_bias=False, affine=False))
PREDICTOR_RULES = (
    *dense_norm_rules(r"0", r"1", "layer1"),
    *dense_norm_rules(r"3", r"4", "layer2", affine=False),
)


def network(folded: bool, group_size: int | None = None) -> Network:
    """MoCo v3's ViT-S with its projector."""
    norm = NormConfig(group_size=group_size)
    return Network(
        vit_small(num_heads=12, fixed_positions=True, freeze_patches=True),
        heads.mocov3_projector(folded=folded, norm=norm),
    )


def predictor(group_size: int | None = None) -> nn.Module:
    """MoCo v3's predictor."""
    return heads.mocov3_predictor(norm=NormConfig(group_size=group_size))


register(
    EncoderSpec(
        name="mocov3",
        title="ViT-S/16 with 12 heads",
        reference="Chen et al. 2021, arXiv:2104.02057",
        url="https://dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/",
        file_name="vit-s-300ep.pth.tar",
        licence="CC BY-NC 4.0",
        network=network,
        rules=RULES,
        paper="projection",
        features="hidden",
        prefix="module.base_encoder.",
        ignored=(r"module\.momentum_encoder\..*", r"module\.predictor\..*"),
        input_size=(224, 224),
        frozen=(r"backbone/(positions|patch_kernel|patch_bias)",),
        parts=(
            TrainingPart(
                "momentum",
                "module.momentum_encoder.",
                lambda **kw: network(False, **kw),
                RULES,
            ),
            TrainingPart(
                "predictor",
                "module.predictor.",
                predictor,
                PREDICTOR_RULES,
                input_size=(256,),
            ),
        ),
    )
)
