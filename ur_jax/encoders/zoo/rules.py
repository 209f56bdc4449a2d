"""Rules for the tensors of common layers and networks in PyTorch's naming."""

from __future__ import annotations

import re

import numpy as np

from ur_jax.encoders.zoo.spec import Rule


def dense_rules(source: str, destination: str, use_bias: bool = True) -> tuple[Rule, ...]:
    """Rules of an nn.Linear: `source` is a regular expression, `destination` below params."""
    kernel = Rule(rf"{source}\.weight", f"params/{destination}/kernel", "dense")
    bias = Rule(rf"{source}\.bias", f"params/{destination}/bias")
    return (kernel, bias) if use_bias else (kernel,)


def norm_rules(source: str, destination: str, affine: bool = True) -> tuple[Rule, ...]:
    """Rules of an nn.BatchNorm, with its gain and bias where it is affine."""
    gain = (
        Rule(rf"{source}\.weight", f"params/{destination}/scale"),
        Rule(rf"{source}\.bias", f"params/{destination}/bias"),
    )
    return (
        *(gain if affine else ()),
        Rule(rf"{source}\.running_mean", f"batch_stats/{destination}/mean"),
        Rule(rf"{source}\.running_var", f"batch_stats/{destination}/var"),
    )


def conv_norm_rules(conv: str, norm: str, destination: str) -> tuple[Rule, ...]:
    """Rules of a convolution without bias and the BatchNorm after it: a `layers.ConvNorm`."""
    kernel = Rule(rf"{conv}\.weight", f"params/{destination}/conv/kernel", "conv")
    return (kernel, *norm_rules(norm, f"{destination}/norm"))


def dense_norm_rules(
    dense: str, norm: str, destination: str, use_bias: bool = False, affine: bool = True
) -> tuple[Rule, ...]:
    """Rules of a linear layer and the BatchNorm after it: a `layers.DenseNorm`."""
    return (
        *dense_rules(dense, f"{destination}/dense", use_bias),
        *norm_rules(norm, f"{destination}/norm", affine),
    )


def resnet_rules(stage_sizes: tuple[int, ...]) -> tuple[Rule, ...]:
    """Rules of torchvision's ResNets, without their fc."""
    rules = list(conv_norm_rules("conv1", "bn1", "backbone/stem"))
    for stage, num_blocks in enumerate(stage_sizes, start=1):
        for index in range(num_blocks):
            source = rf"layer{stage}\.{index}\."
            block = f"backbone/stage{stage}_block{index + 1}"
            rules += conv_norm_rules(rf"{source}conv(\d)", rf"{source}bn(\d)", rf"{block}/conv\1")
            shortcut = rf"{source}downsample\."
            rules += conv_norm_rules(rf"{shortcut}0", rf"{shortcut}1", f"{block}/shortcut")
    return tuple(rules)


def projector_rules(source: str, last_bias: bool, affine: bool) -> tuple[Rule, ...]:
    """Rules of a projector of three linear layers: 0, 3, 6, with BatchNorms 1, 4, 7."""
    return (
        *dense_norm_rules(rf"{source}\.0", rf"{source}\.1", "head/layer1"),
        *dense_norm_rules(rf"{source}\.3", rf"{source}\.4", "head/layer2"),
        *dense_norm_rules(rf"{source}\.6", rf"{source}\.7", "head/layer3", last_bias, affine),
    )


def vit_rules() -> tuple[Rule, ...]:
    """Rules of timm's vision transformers, without a head."""
    block, ours = r"blocks\.(\d+)", r"backbone/block\1"
    layers = {"attn.qkv": "qkv", "attn.proj": "mix", "mlp.fc1": "expand", "mlp.fc2": "contract"}
    rules = [
        Rule("cls_token", "params/backbone/class_token", np.ravel),
        Rule("pos_embed", "params/backbone/positions", np.squeeze),
        Rule(r"patch_embed\.proj\.weight", "params/backbone/patch_kernel", _patch_kernel),
        Rule(r"patch_embed\.proj\.bias", "params/backbone/patch_bias"),
        Rule(rf"{block}\.norm(\d)\.weight", rf"params/{ours}/norm\2/scale"),
        Rule(rf"{block}\.norm(\d)\.bias", rf"params/{ours}/norm\2/bias"),
        Rule(r"norm\.weight", "params/backbone/final_norm/scale"),
        Rule(r"norm\.bias", "params/backbone/final_norm/bias"),
    ]
    for theirs, name in layers.items():
        rules += dense_rules(rf"{block}\.{re.escape(theirs)}", f"{ours}/{name}")
    return tuple(rules)


def _patch_kernel(kernel: np.ndarray) -> np.ndarray:
    """(O,I,P,P) -> (P P I,O), the order in which `ViT` flattens a patch."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))


RESNET50_RULES = resnet_rules((3, 4, 6, 3))
