"""The benchmarked encoders: one entry each, and the tables that map their published tensors."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ur_jax.encoders.networks import heads
from ur_jax.encoders.networks.amdim import AMDIM
from ur_jax.encoders.networks.layers import NormConfig
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.resnet import cifar_resnet20, resnet50
from ur_jax.encoders.networks.simclr import SimCLRResNet
from ur_jax.encoders.networks.vit import vit_large, vit_small
from ur_jax.encoders.zoo.spec import EncoderSpec, Rule, TrainingPart
from ur_jax.errors import UserError


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


def _projector_rules(source: str, last_bias: bool, affine: bool) -> tuple[Rule, ...]:
    """Rules of a projector of three linear layers: 0, 3, 6, with BatchNorms 1, 4, 7."""
    return (
        *dense_norm_rules(rf"{source}\.0", rf"{source}\.1", "head/layer1"),
        *dense_norm_rules(rf"{source}\.3", rf"{source}\.4", "head/layer2"),
        *dense_norm_rules(rf"{source}\.6", rf"{source}\.7", "head/layer3", last_bias, affine),
    )


def _pointwise_rules(source: str, destination: str) -> tuple[Rule, ...]:
    """Rules of a 1x1 convolution with bias that is a linear layer of ours."""
    return (
        Rule(rf"{source}\.weight", f"params/{destination}/kernel", _pointwise_kernel),
        Rule(rf"{source}\.bias", f"params/{destination}/bias"),
    )


def _pointwise_kernel(kernel: np.ndarray) -> np.ndarray:
    """(O,I,1,1) -> (I,O)."""
    return kernel.reshape(kernel.shape[:2]).T


def _patch_kernel(kernel: np.ndarray) -> np.ndarray:
    """(O,I,P,P) -> (P P I,O), the order in which `ViT` flattens a patch."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))


def _simclrv2_rules() -> tuple[Rule, ...]:
    """Rules of SimCLR v2's ResNets; which of them apply tells selective kernels from none."""
    source, block = r"net\.(\d+)\.blocks\.(\d+)\.", r"backbone/stage\1_block\2"
    net, shortcut = rf"{source}net\.", rf"{source}projection\.shortcut"
    stem = r"net\.0\."
    layers = []
    for i, number in ((0, 1), (2, 2), (4, 3)):
        layers.append((rf"{stem}{i}", rf"{stem}{i + 1}", f"backbone/stem{number}"))
        layers.append((rf"{net}{i}", rf"{net}{i + 1}", f"{block}/conv{number}"))
    layers += [
        (rf"{net}2\.main_conv\.0", rf"{net}2\.main_conv\.1", f"{block}/select/branches"),
        (rf"{net}2\.mixing_conv\.0", rf"{net}2\.mixing_conv\.1", f"{block}/select/squeeze"),
        (rf"{net}3", rf"{net}4", f"{block}/expand"),
        (shortcut, rf"{source}projection\.bn", f"{block}/shortcut"),
        (rf"{shortcut}\.2", rf"{source}projection\.bn", f"{block}/pooled_shortcut"),
    ]
    rules = [conv_norm_rules(conv, rf"{norm}\.0", name) for conv, norm, name in layers]
    excite = f"params/{block}/select/excite/kernel"
    rules.append((Rule(rf"{net}2\.mixing_conv\.2\.weight", excite, "conv"),))
    return (*sum(rules, ()), *_projector_rules("layers", last_bias=False, affine=True))


def _simclrv2_config(contents: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Depth, width and selective kernels of a SimCLR v2 file."""
    depths = {"1": 1, "2": 1, "3": 1, "4": 1}
    for key in shapes:
        if match := re.match(r"net\.([1-4])\.blocks\.(\d+)\.", key):
            depths[match[1]] = max(depths[match[1]], int(match[2]) + 1)
    # From the norms of several blocks, so that one wrong tensor does not turn all the others wrong.
    widths = collections.Counter(
        shape[0]
        for key, shape in shapes.items()
        if re.fullmatch(r"net\.1\.blocks\.\d+\.net\.1\.0\.(weight|bias)", key) and shape
    )
    return {
        "stage_sizes": tuple(depths.values()),
        "width": widths.most_common(1)[0][0] if widths else 64,
        "selective": any("main_conv" in key for key in shapes),
    }


def _vit_rules() -> tuple[Rule, ...]:
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


def _amdim_rules() -> tuple[Rule, ...]:
    """Rules of AMDIM's encoder: blocks 2, 3, 4, 6, 7 of its list, unit 8 and BatchNorm 9."""
    items, ours, rules = r"layer_list\.", "params/backbone", []
    for index in range(2):
        rules += [
            Rule(rf"{items}{index}\.conv\.weight", f"{ours}/stem{index + 1}/kernel", "conv"),
            Rule(rf"{items}{index}\.conv\.bias", f"{ours}/stem{index + 1}/bias"),
        ]
    for block, index in enumerate((2, 3, 4, 6, 7), start=1):
        source = rf"{items}{index}\.layer_list\.(\d+)\.conv(\d)\.weight"
        rules.append(Rule(source, rf"{ours}/block{block}_unit\1/conv\2/kernel", "conv"))
    rules.append(Rule(rf"{items}8\.conv(\d)\.weight", rf"{ours}/last_unit/conv\1/kernel", "conv"))
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    for theirs, name in names.items():
        rules.append(Rule(rf"{items}9\.bn\.{theirs}", f"{ours}/last_norm/{name}"))
    return tuple(rules)


def _amdim_config(
    contents: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Width, depth and dimension of an AMDIM file; refuses one whose hidden BatchNorms are on."""
    hyperparams = contents.get("hyperparams", {})
    for name, expected in (("encoder_size", 128), ("use_bn", False)):
        if hyperparams.get(name, expected) != expected:
            raise UserError(
                f"Expected an AMDIM file with {name}={expected}, got {hyperparams[name]}: the "
                "published models have it so, and no other encoder of AMDIM's is here."
            )
    size = lambda key, default: (shapes.get(f"encoder.module.layer_list.{key}") or (default,))[0]
    unit = re.compile(r"encoder\.module\.layer_list\.2\.layer_list\.(\d+)\.")
    units = [match for match in map(unit.match, shapes) if match]
    return {
        "width": size("0.conv.bias", 256),
        "dimension": size("9.bn.bias", 2048),
        "depth": max((int(match[1]) + 1 for match in units), default=10),
    }


def _mocov2(folded: bool, group_size: int | None = None) -> Network:
    """MoCo v2's ResNet-50 with its head."""
    norm = NormConfig(group_size=group_size)
    return Network(resnet50(folded=folded, norm=norm), heads.MocoV2Head())


def _mocov3(folded: bool, group_size: int | None = None) -> Network:
    """MoCo v3's ViT-S with its projector."""
    norm = NormConfig(group_size=group_size)
    return Network(
        vit_small(num_heads=12, fixed_positions=True, freeze_patches=True),
        heads.mocov3_projector(folded=folded, norm=norm),
    )


def _mocov3_predictor(group_size: int | None = None) -> nn.Module:
    """MoCo v3's predictor."""
    return heads.mocov3_predictor(norm=NormConfig(group_size=group_size))


_RESNET50_RULES = resnet_rules((3, 4, 6, 3))
_MOCOV2_RULES = (*_RESNET50_RULES, *dense_rules(r"fc\.(\d)", r"head/fc\1"))
_MOCOV3_RULES = (*_vit_rules(), *_projector_rules("head", last_bias=False, affine=False))
_MOCOV3_PREDICTOR_RULES = (
    *dense_norm_rules(r"0", r"1", "layer1"),
    *dense_norm_rules(r"3", r"4", "layer2", affine=False),
)

_DEMO = EncoderSpec(
    name="demo",
    title="CIFAR-stem ResNet-20, MoCo v2 on CIFAR-10",
    reference="trained by experiments/train.py",
    url="ships with ur_jax",
    file_name="",
    licence="Apache-2.0",
    network=lambda folded, group_size=None: Network(
        cifar_resnet20(folded=folded, norm=NormConfig(group_size=group_size)),
        heads.MocoV2Head(64, 128),
    ),
    rules=(),
    paper="backbone",
    input_size=(32, 32),
)

_SPECS = (
    EncoderSpec(
        name="resnet50",
        title="ResNet-50, supervised",
        reference="He et al. 2016, arXiv:1512.03385",
        url="torchvision's model zoo (IMAGENET1K_V1)",
        file_name="resnet50-0676ba61.pth",
        licence="not stated (torchvision: BSD-3-Clause)",
        network=lambda folded: Network(resnet50(folded=folded), heads.LinearHead()),
        rules=(*_RESNET50_RULES, *dense_rules("fc", "head/fc")),
        paper="backbone",
        groups=(),
    ),
    EncoderSpec(
        name="mocov2",
        title="ResNet-50",
        reference="Chen et al. 2020, arXiv:2003.04297",
        url="https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_200ep/",
        file_name="moco_v2_200ep_pretrain.pth.tar",
        licence="CC BY-NC 4.0",
        network=_mocov2,
        rules=_MOCOV2_RULES,
        paper="skip_hidden",
        prefix="module.encoder_q.",
        ignored=(r"module\.encoder_k\..*", r"module\.queue(_ptr)?"),
        parts=(
            TrainingPart(
                "momentum", "module.encoder_k.", lambda **kw: _mocov2(False, **kw), _MOCOV2_RULES
            ),
        ),
    ),
    EncoderSpec(
        name="mocov3",
        title="ViT-S/16 with 12 heads",
        reference="Chen et al. 2021, arXiv:2104.02057",
        url="https://dl.fbaipublicfiles.com/moco-v3/vit-s-300ep/",
        file_name="vit-s-300ep.pth.tar",
        licence="CC BY-NC 4.0",
        network=_mocov3,
        rules=_MOCOV3_RULES,
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
                lambda **kw: _mocov3(False, **kw),
                _MOCOV3_RULES,
            ),
            TrainingPart(
                "predictor",
                "module.predictor.",
                _mocov3_predictor,
                _MOCOV3_PREDICTOR_RULES,
                input_size=(256,),
            ),
        ),
    ),
    EncoderSpec(
        name="moco_nonsem",
        title="ResNet-50",
        reference="Ge et al. 2021, arXiv:2110.14189",
        url="the authors' drive, linked from the paper's repository",
        file_name="mocov2_mocok16384_bs128_lr0.03_nonsem_noaug_16_72_nn1_alpha3_epoch200.pth.tar",
        licence="not stated (its repository: MIT)",
        network=lambda folded: Network(resnet50(folded=folded), heads.LinearHead()),
        rules=(*_RESNET50_RULES, *dense_rules("fc", "head/fc")),
        paper="projection",
        prefix="module.",
    ),
    EncoderSpec(
        name="simsiam",
        title="ResNet-50",
        reference="Chen & He 2021, arXiv:2011.10566",
        url="https://dl.fbaipublicfiles.com/simsiam/models/100ep-256bs/pretrain/",
        file_name="checkpoint_0099.pth.tar",
        licence="CC BY-NC 4.0",
        network=lambda folded: Network(
            resnet50(folded=folded), heads.simsiam_projector(folded=folded)
        ),
        rules=(*_RESNET50_RULES, *_projector_rules("fc", last_bias=True, affine=False)),
        paper="projection",
        prefix="module.encoder.",
        ignored=(r"module\.predictor\..*",),
    ),
    EncoderSpec(
        name="pixpro",
        title="ResNet-50",
        reference="Xie et al. 2021, arXiv:2011.10043",
        url="the authors' drive, linked from the paper's repository",
        file_name="pixpro_base_r50_400ep_md5_919c6612.pth",
        licence="not stated (its repository: MIT)",
        network=lambda folded: heads.PositionwiseNetwork(
            resnet50(folded=folded), heads.pixpro_projector(folded=folded)
        ),
        rules=(
            *(rule._replace(source=rf"encoder\.{rule.source}") for rule in _RESNET50_RULES),
            *_pointwise_rules(r"projector\.linear1", "head/layer1/dense"),
            *norm_rules(r"projector\.bn1", "head/layer1/norm"),
            *_pointwise_rules(r"projector\.linear2", "head/layer2"),
        ),
        paper="backbone",
        groups=("model",),
        prefix="module.",
        ignored=(r"module\.(encoder|projector)_k\..*", r"module\.value_transform\..*"),
    ),
    EncoderSpec(
        name="simclrv2",
        title="ResNet-50 to 152, width 1 to 3, with or without selective kernels",
        reference="Chen et al. 2020, arXiv:2006.10029",
        url="the authors' drive, linked from the paper's repository",
        file_name="simclr2_r50_1x_sk0.pth",
        licence="not stated (SimCLR's repository: Apache-2.0)",
        network=lambda folded, stage_sizes=(3, 4, 6, 3), width=64, selective=False: Network(
            SimCLRResNet(stage_sizes, width, selective, folded=folded),
            heads.simclrv2_projector(32 * width, folded=folded),
        ),
        rules=_simclrv2_rules(),
        paper="backbone",
        groups=("resnet", "head"),
        ignored=(r"fc\.(weight|bias)",),
        input_size=(224, 224),
        preparation="resize_crop",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        config_fn=_simclrv2_config,
    ),
    EncoderSpec(
        name="amdim",
        title="AMDIM encoder, ndf 256, rkhs 2048, depth 10",
        reference="Bachman et al. 2019, arXiv:1906.00910",
        url="https://amdimmodels.blob.core.windows.net/amdim/",
        file_name="amdim_ndf256_rkhs2048_rd10.pth",
        licence="not stated (its repository: MIT)",
        network=lambda folded, **config: Network(AMDIM(**config), heads.NoHead()),
        rules=_amdim_rules(),
        paper="backbone",
        groups=("model",),
        prefix="encoder.module.",
        ignored=(
            r"encoder\.module\.layer_list\.(\d+\.(layer_list\.\d+\.)?bn1|5)\.bn\..*",
            r"encoder\.module\.rkhs_block_[57]\..*",
            r"g2l_loss\.masks_r5",
            r"evaluator\..*",
        ),
        frozen=(r"backbone/last_norm/(mean|var)",),
        config_fn=_amdim_config,
    ),
    EncoderSpec(
        name="mae",
        title="ViT-L/16",
        reference="He et al. 2022, arXiv:2111.06377",
        url="https://dl.fbaipublicfiles.com/mae/pretrain/",
        file_name="mae_pretrain_vit_large.pth",
        licence="CC BY-NC 4.0",
        network=lambda folded: Network(vit_large(), heads.NoHead()),
        rules=_vit_rules(),
        paper="backbone",
        groups=("model",),
        ignored=(r"head\.(weight|bias)",),
        input_size=(224, 224),
    ),
    _DEMO,
    dataclasses.replace(
        _DEMO,
        name="demo-robust",
        title="the demo encoder, adversarially fine-tuned",
        reference="made by experiments/reproduce_cifar.py",
    ),
)

ENCODERS: dict[str, EncoderSpec] = {spec.name: spec for spec in _SPECS}
"""Every encoder that `load_encoder` knows, by name."""


def list_encoders() -> tuple[str, ...]:
    """Returns the names of the encoders that `load_encoder` knows."""
    return tuple(ENCODERS)
