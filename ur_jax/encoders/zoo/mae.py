"""MAE's ViT-L (He et al. 2022)."""

from __future__ import annotations

from ur_jax.encoders.networks.heads import NoHead
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.vit import vit_large
from ur_jax.encoders.zoo.rules import vit_rules
from ur_jax.encoders.zoo.spec import EncoderSpec, register

register(
    EncoderSpec(
        name="mae",
        title="ViT-L/16",
        reference="He et al. 2022, arXiv:2111.06377",
        url="https://dl.fbaipublicfiles.com/mae/pretrain/",
        file_name="mae_pretrain_vit_large.pth",
        licence="CC BY-NC 4.0",
        network=lambda folded: Network(vit_large(), NoHead()),
        rules=vit_rules(),
        paper="backbone",
        groups=("model",),
        ignored=(r"head\.(weight|bias)", r"decoder_.*", "mask_token"),
        input_size=(224, 224),
    )
)
