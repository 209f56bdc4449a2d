"""The encoders that ship with the package."""

from __future__ import annotations

import dataclasses

from ur_jax.encoders.networks.heads import MocoV2Head
from ur_jax.encoders.networks.layers import NormConfig
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.resnet import cifar_resnet20
from ur_jax.encoders.zoo.spec import EncoderSpec, register

_DEMO = register(
    EncoderSpec(
        name="demo",
        title="CIFAR-stem ResNet-20, MoCo v2 on CIFAR-10",
        reference="trained by experiments/train.py",
        url="ships with ur_jax",
        file_name="",
        licence="Apache-2.0",
        network=lambda folded, group_size=None: Network(
            cifar_resnet20(folded=folded, norm=NormConfig(group_size=group_size)),
            MocoV2Head(64, 128),
        ),
        rules=(),
        paper="backbone",
        input_size=(32, 32),
    )
)

for _name in ("demo-robust", "demo-robust-v1"):
    register(
        dataclasses.replace(
            _DEMO,
            name=_name,
            title="the demo encoder, adversarially fine-tuned",
            reference="made by experiments/reproduce_cifar.py",
        )
    )
