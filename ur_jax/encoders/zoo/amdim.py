"""AMDIM (Bachman et al. 2019)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ur_jax.encoders.networks.amdim import AMDIM
from ur_jax.encoders.networks.heads import NoHead
from ur_jax.encoders.networks.network import Network
from ur_jax.encoders.zoo.spec import EncoderSpec, Rule, register
from ur_jax.errors import UserError


def _rules() -> tuple[Rule, ...]:
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


def _config(contents: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
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


register(
    EncoderSpec(
        name="amdim",
        title="AMDIM encoder, ndf 256, rkhs 2048, depth 10",
        reference="Bachman et al. 2019, arXiv:1906.00910",
        url="https://amdimmodels.blob.core.windows.net/amdim/",
        file_name="amdim_ndf256_rkhs2048_rd10.pth",
        licence="not stated (its repository: MIT)",
        network=lambda folded, **config: Network(AMDIM(**config), NoHead()),
        rules=_rules(),
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
        config_fn=_config,
    )
)
