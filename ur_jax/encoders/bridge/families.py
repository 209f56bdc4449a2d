"""Which output of a published network its users take, and how its images are prepared.

A table of the families that Hugging Face's transformers knows by the `model_type` in config.json,
and of timm's that need something else than the pooled output. What is not in it gives its
`pooler_output`, or is asked for by `--output`. The preparation is the model's own: its
preprocessor_config.json, or timm's data config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ur_jax.encoders.preparation import Preparation
from ur_jax.encoders.zoo.spec import IMAGENET_MEAN, IMAGENET_STD
from ur_jax.errors import UserError, shown

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
NAMED_STATISTICS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "clip": (CLIP_MEAN, CLIP_STD)}


@dataclasses.dataclass(frozen=True)
class Images:
    """How images are prepared: of Hugging Face's preprocessor_config.json, timm's or a family's.

    Attributes:
      size: height and width.
      preparation: its name, see `encoders.preparation`.
      mean, std: per channel, of pixels in [0,1].
    """

    size: tuple[int, int]
    preparation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks in transformers.

    Attributes:
      classes: the class to load, by its name in transformers; "backbone" may need another.
      output: what its users take, as `from_torch` names it.
      backbone: what `--output backbone` stands for.
      images: how images are prepared where no preprocessor_config.json says it.
    """

    classes: str
    output: str
    backbone: str = ""
    backbone_class: str = ""
    images: Images | None = None


def _images(size: int, preparation: str, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD):
    return Images((size, size), preparation, mean, std)


_DINO = _images(224, "shorter-256-bicubic-floor")
_SQUARE = _images(224, "resize")
_CLIP = _images(224, "shorter-224-bicubic-floor", CLIP_MEAN, CLIP_STD)
_SIGLIP = _images(224, "resize-bicubic", HALF, HALF)
_CLASS, _MEAN = "last_hidden_state.cls", "last_hidden_state.mean"
_EMBEDDING = "image_embeds.normalized"

_clip = Family(
    "CLIPVisionModelWithProjection", _EMBEDDING, "pooler_output", "CLIPVisionModel", _CLIP
)
_metaclip = dataclasses.replace(
    _clip, classes="MetaClip2VisionModelWithProjection", backbone_class="MetaClip2VisionModel"
)
_siglip = Family(
    "SiglipVisionModel", "pooler_output.normalized", _MEAN, "SiglipVisionModel", _SIGLIP
)

FAMILIES: Mapping[str, Family] = {
    "dinov2": Family("Dinov2Model", _CLASS, images=_DINO),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", _CLASS, images=_DINO),
    "dinov3_vit": Family("DINOv3ViTModel", _CLASS, images=_SQUARE),
    "dinov3_convnext": Family("DINOv3ConvNextModel", "pooler_output", images=_SQUARE),
    "clip": _clip,
    "clip_vision_model": _clip,
    "metaclip_2": _metaclip,
    "metaclip_2_vision_model": _metaclip,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
    "ijepa": Family("IJepaModel", _MEAN, images=_SQUARE),
    "aimv2": Family("Aimv2VisionModel", _MEAN, images=_CLIP),
    "aimv2_vision_model": Family("Aimv2VisionModel", _MEAN, images=_CLIP),
    # The masked autoencoder's encoder sees all patches, in order: the plain transformer.
    "vit_mae": Family("ViTModel", _CLASS, images=_SQUARE),
    "vit": Family("ViTModel", _CLASS, images=_images(224, "resize", HALF, HALF)),
    "vit_msn": Family("ViTMSNModel", _CLASS, images=_SQUARE),
    "deit": Family("DeiTModel", _CLASS, images=_images(224, "shorter-256-bicubic-floor")),
    "beit": Family("BeitModel", "pooler_output", images=_images(224, "resize", HALF, HALF)),
    "resnet": Family("ResNetModel", "pooler_output.flat", images=_SQUARE),
    "regnet": Family("RegNetModel", "pooler_output.flat", images=_SQUARE),
    "convnext": Family("ConvNextModel", "pooler_output", images=_SQUARE),
    "convnextv2": Family("ConvNextV2Model", "pooler_output", images=_SQUARE),
    "swin": Family("SwinModel", "pooler_output", images=_SQUARE),
    "swinv2": Family("Swinv2Model", "pooler_output", images=_SQUARE),
    "mobilenet_v2": Family("MobileNetV2Model", "pooler_output", images=_SQUARE),
    "efficientnet": Family("EfficientNetModel", "pooler_output", images=_SQUARE),
}
"""By `model_type`."""

REFUSED: Mapping[str, str] = {
    "siglip2": "SigLIP 2 of variable size (NaFlex) takes patches, not images; take one of fixed "
    "size",
    "siglip2_vision_model": "SigLIP 2 of variable size takes patches, not images; take a fixed one",
}


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family of a config.json; of an unknown one the class that transformers has for it."""
    kind = config.get("model_type")
    if str(kind) in REFUSED:
        raise UserError(f"{source}: {REFUSED[str(kind)]}.")
    return FAMILIES.get(str(kind), Family("AutoModel", "pooler_output", _MEAN))


_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def images_of_processor(config: Mapping[str, Any], source: str) -> Images:
    """What a preprocessor_config.json says.

    Raises:
      UserError: for what is not known here, such as padding.
    """
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    size, crop = config.get("size"), config.get("crop_size")
    filter = _FILTERS.get(config.get("resample", 3 if "CLIP" in kind else 2))
    if config.get("do_pad") or filter is None or config.get("do_resize") is False:
        raise UserError(
            f"{source}: its preprocessor_config.json asks for padding, no resizing or an unknown "
            "filter, "
            "which is not known here; give preparation and input_size yourself."
        )
    crops = config.get("do_center_crop", "crop_size" in config) and crop is not None
    sides = _sides(size, shorter_only=True)
    if kind.startswith("ConvNext") and isinstance(sides, int):
        shorter = int(sides / config.get("crop_pct", 224 / 256)) if sides < 384 else None
        crops, crop = shorter is not None, sides
        sides = shorter or (sides, sides)
    elif isinstance(size, int) and not crops:
        sides = (size, size)
    if isinstance(sides, int):
        target = _sides(crop) if crops else None
        if not isinstance(target, tuple):
            raise UserError(
                f"{source}: its preprocessor_config.json keeps the aspect ratio of images (size "
                f"{shown(size)}) without a crop, but an encoder takes one size; give input_size."
            )
        preparation = Preparation(sides, filter, floor=True)
    else:
        target, preparation = sides, Preparation(None, filter)
        if crops and _sides(crop) != target:
            raise UserError(
                f"{source}: its preprocessor_config.json resizes to {shown(size)} and crops "
                f"{shown(crop)}, which is not known here; give preparation and input_size yourself."
            )
    mean, std = config.get("image_mean", IMAGENET_MEAN), config.get("image_std", IMAGENET_STD)
    if config.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    # Of pixels in [0,1]: (255 p f - mean) / std
    factor = (
        255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
    )
    factor = 1.0 if abs(factor - 1) < 1e-9 else factor
    mean, std = (tuple(float(v) / factor for v in _three(x)) for x in (mean, std))
    return Images(target, preparation.name, _three(mean), _three(std))


def _three(values: Any) -> tuple[float, float, float]:
    """A number for each channel."""
    if isinstance(values, (int, float)):
        values = (values,) * 3
    if len(values) != 3:
        raise UserError(f"Expected mean and std of 3 channels, got {shown(values)}.")
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def _sides(size: Any, *, shorter_only: bool = False) -> int | tuple[int, int]:
    """(height, width), or the shorter side alone."""
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"])
        if {"height", "width"} <= set(size):
            return int(size["height"]), int(size["width"])
    elif isinstance(size, int):
        return size if shorter_only else (size, size)
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise UserError(f"Expected a size of images, got {shown(size)} in preprocessor_config.json.")


def images_of_timm(config: Mapping[str, Any], source: str) -> Images:
    """What timm's data config says, as `timm.data.resolve_data_config` gives it."""
    height, width = config["input_size"][1:]
    mode, share = config.get("crop_mode", "center"), config.get("crop_pct") or 0.875
    filter = config.get("interpolation", "bilinear")
    if filter == "random":
        filter = "bilinear"
    if mode == "squash" or (mode == "center" and height != width and share == 1):
        name = Preparation(None, filter).name
    elif mode == "center" and height == width:
        name = Preparation(
            int(height // share if share == 1 else _floor(height / share)), filter
        ).name
    else:
        raise UserError(
            f"{source}: timm's data config crops by {mode!r} to {height}x{width}, which is not "
            "known "
            "here; give preparation and input_size yourself."
        )
    return Images((height, width), name, _three(config["mean"]), _three(config["std"]))


def _floor(value: float) -> int:
    return int(value // 1)


KEPT_HEADS = ("_clip_", "pe_core")
"""Of timm's names: whose classifier is the projection that its users take."""

NORMALIZED = ("_clip_", "siglip")
"""Of timm's names: whose representation is of length 1."""

CLASS_TOKENS = ("dinov3",)
"""Of timm's names: whose class token is taken though timm averages."""
