"""PixPro (Xie et al. 2021)."""

from __future__ import annotations

import numpy as np

from ur_jax.encoders.networks.heads import PositionwiseNetwork, pixpro_projector
from ur_jax.encoders.networks.resnet import resnet50
from ur_jax.encoders.zoo.rules import RESNET50_RULES, norm_rules
from ur_jax.encoders.zoo.spec import EncoderSpec, Rule, register


def _pointwise_rules(source: str, destination: str) -> tuple[Rule, ...]:
    """Rules of a 1x1 convolution with bias that is a linear layer of ours."""
    return (
        Rule(rf"{source}\.weight", f"params/{destination}/kernel", _pointwise_kernel),
        Rule(rf"{source}\.bias", f"params/{destination}/bias"),
    )


def _pointwise_kernel(kernel: np.ndarray) -> np.ndarray:
    """(O,I,1,1) -> (I,O)."""
    return kernel.reshape(kernel.shape[:2]).T


register(
    EncoderSpec(
        name="pixpro",
        title="ResNet-50",
        reference="Xie et al. 2021, arXiv:2011.10043",
        url="the authors' drive, linked from the paper's repository",
        file_name="pixpro_base_r50_400ep_md5_919c6612.pth",
        licence="not stated (its repository: MIT)",
        network=lambda folded: PositionwiseNetwork(
            resnet50(folded=folded), pixpro_projector(folded=folded)
        ),
        rules=(
            *(rule._replace(source=rf"encoder\.{rule.source}") for rule in RESNET50_RULES),
            *_pointwise_rules(r"projector\.linear1", "head/layer1/dense"),
            *norm_rules(r"projector\.bn1", "head/layer1/norm"),
            *_pointwise_rules(r"projector\.linear2", "head/layer2"),
        ),
        paper="backbone",
        groups=("model",),
        prefix="module.",
        ignored=(r"module\.(encoder|projector)_k\..*", r"module\.value_transform\..*"),
    )
)
