"""SimCLR v2 (Chen et al. 2020): every depth and width, with or without selective kernels."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

from ur_jax.encoders.networks.heads import simclrv2_projector
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.networks.simclr import SimCLRResNet
from ur_jax.encoders.zoo.rules import conv_norm_rules, projector_rules
from ur_jax.encoders.zoo.spec import EncoderSpec, Rule, register


def _rules() -> tuple[Rule, ...]:
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
    return (*sum(rules, ()), *projector_rules("layers", last_bias=False, affine=True))


def _config(contents: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
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


register(
    EncoderSpec(
        name="simclrv2",
        title="ResNet-50 to 152, width 1 to 3, with or without selective kernels",
        reference="Chen et al. 2020, arXiv:2006.10029",
        url="the authors' drive, linked from the paper's repository",
        file_name="simclr2_r50_1x_sk0.pth",
        licence="not stated (SimCLR's repository: Apache-2.0)",
        network=lambda folded, stage_sizes=(3, 4, 6, 3), width=64, selective=False: Network(
            SimCLRResNet(stage_sizes, width, selective, folded=folded),
            simclrv2_projector(32 * width, folded=folded),
        ),
        rules=_rules(),
        paper="backbone",
        groups=("resnet", "head"),
        ignored=(r"fc\.(weight|bias)",),
        input_size=(224, 224),
        preparation="resize_crop",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        config_fn=_config,
    )
)
