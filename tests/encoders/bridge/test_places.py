"""Networks of PyTorch by name: functions, folders, timm; what is refused is one line."""

from __future__ import annotations

import json

import numpy as np
import pytest

import ur_jax
from ur_jax.encoders import convert
from ur_jax.encoders.bridge import families, hub, places
from ur_jax.encoders.loading import is_loadable, is_own
from ur_jax.encoders.preparation import Preparation, parse_preparation
from ur_jax.errors import NotFoundError, UserError

torch = pytest.importorskip("torch")

SOURCE = """
import torch.nn as nn


def make(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())

def described():
    return make(3), {"input_size": (8, 10), "mean": (0.5,) * 3, "preparation": "resize-bicubic"}

def nothing():
    return "a string"

def wrong():
    return make(), {"size": 8}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    file = tmp_path_factory.mktemp("nets") / "bridge_net.py"
    file.write_text(SOURCE)
    return f"torch:{file}"


def test_a_function_that_returns_a_module(place, capsys, tmp_path):
    encoder = ur_jax.load_encoder(f"{place}:make,width=6,input_size=8,mean=imagenet,std=0.25")
    assert (encoder.dimension, encoder.input_size, encoder.std) == (6, (8, 8), (0.25,) * 3)
    assert encoder.mean == (0.485, 0.456, 0.406)
    assert "6 numbers; images 8x8, resize" in capsys.readouterr().err
    described = ur_jax.load_encoder(f"{place}:described")
    assert (described.input_size, described.preparation) == ((8, 10), "resize-bicubic")
    assert is_loadable(f"{place}:make") and is_own(f"{place}:make")
    convert.main(convert.Config(encoder=f"{place}:make", input_size="8x12", out=tmp_path / "made"))
    loaded = ur_jax.load_encoder(tmp_path / "made")
    assert loaded.input_size == (8, 12) and loaded.dimension == 4
    assert loaded.origin.place == f"{place}:make"
    with pytest.raises(UserError, match="exists"):
        convert.main(convert.Config(encoder=f"{place}:make", input_size="8", out=tmp_path / "made"))


@pytest.mark.parametrize(
    "rest, message",
    [
        (":make", "how large its images are"),
        (":mke,input_size=8", "did you mean 'make'"),
        (":make,input_size=8,widht=3", "did you mean 'width'"),
        (":make,input_size=8,mean=clipp", "did you mean 'clip'"),
        (":make,input_size=eight", "224 or 224x336"),
        (":nothing,input_size=8", "return a torch.nn.Module, got str"),
        (":wrong", "setting that"),
        (":make,input_size=8,preparation=resise", "did you mean 'resize"),
    ],
)
def test_functions_that_are_refused(place, rest, message):
    with pytest.raises(UserError, match=message):
        ur_jax.load_encoder(place + rest)


def folder(path, config=None, **files):
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return str(path)


def test_folders_that_are_refused(tmp_path):
    empty = folder(tmp_path / "empty")
    with pytest.raises(UserError, match="Expected config.json .* it has nothing"):
        hub.snapshot(empty)
    bare = folder(tmp_path / "bare", {"model_type": "vit"})
    with pytest.raises(UserError, match="config.json but no weights"):
        hub.snapshot(bare)
    with pytest.raises(NotFoundError, match="did you mean 'bare'"):
        hub.snapshot(str(tmp_path / "bar"))
    with pytest.raises(UserError, match="no revision with the folder"):
        hub.snapshot(f"{bare}@main")
    torch.save({"x": print}, tmp_path / "evil")
    evil = folder(tmp_path / "dir", {}, pytorch_model__bin=(tmp_path / "evil").read_bytes())
    with pytest.raises(UserError, match="Nothing was run"):
        hub.snapshot(evil)
    with pytest.raises(UserError, match="takes patches"):
        families.family_of({"model_type": "siglip2"}, "it")


CLIP = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "image_mean": list(families.CLIP_MEAN), "image_std": list(families.CLIP_STD),
}  # fmt: skip


@pytest.mark.parametrize(
    "config, size, preparation",
    [
        (CLIP, (224, 224), "shorter-224-bicubic-floor"),
        ({**CLIP, "size": 256}, (224, 224), "shorter-256-bicubic-floor"),
        ({"size": {"height": 384, "width": 384}, "resample": 3, "image_mean": [0.5] * 3,
          "image_std": [0.5] * 3}, (384, 384), "resize-bicubic"),
        ({"size": 224, "resample": 2}, (224, 224), "resize"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224},
          "crop_pct": 0.875, "resample": 3}, (224, 224), "shorter-256-bicubic-floor"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384},
          "resample": 3}, (384, 384), "resize-bicubic"),
    ],
)  # fmt: skip
def test_preprocessor_configs(config, size, preparation):
    images = families.images_of_processor(config, "it")
    assert (images.size, images.preparation) == (size, preparation)


def test_statistics_of_pixels_on_another_scale():
    plain = families.images_of_processor({"size": 8, "do_normalize": False}, "it")
    assert (plain.mean, plain.std) == ((0.0,) * 3, (1.0,) * 3)
    twice = {"size": 8, "rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}
    images = families.images_of_processor(twice, "it")  # 2 p - 1
    np.testing.assert_allclose([images.mean[0], images.std[0]], [0.5, 0.5])
    for wrong in ({"size": 8, "do_pad": True}, {"size": {"shortest_edge": 8}}, {"size": "large"}):
        with pytest.raises(UserError):
            families.images_of_processor(wrong, "it")


def test_names_of_preparations():
    for name in (
        "resize",
        "resize_crop",
        "resize-bicubic",
        "shorter-248-bicubic",
        "shorter-9-nearest-floor",
    ):
        assert parse_preparation(name).name == name
    assert Preparation(224, "bicubic", True).name == "shorter-224-bicubic-floor"
    for wrong in (
        "shorter-0-bicubic",
        "shorter-bicubic",
        "resize-area",
        "shorter-9-bicubic-floor-floor",
    ):
        with pytest.raises(UserError, match="Unknown preparation"):
            parse_preparation(wrong)


def test_timms_data_configs():
    config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.9,
              "mean": (0.5,) * 3, "std": (0.5,) * 3}  # fmt: skip
    assert families.images_of_timm(config, "it").preparation == "shorter-248-bicubic"
    squashed = {**config, "crop_mode": "squash", "interpolation": "bilinear"}
    assert families.images_of_timm(squashed, "it").preparation == "resize"
    with pytest.raises(UserError, match="crops by 'border'"):
        families.images_of_timm({**config, "crop_mode": "border"}, "it")


def test_what_is_no_place():
    assert not places.is_place("gs://bucket/encoder") and not places.is_place("hf:")
    assert not places.is_place("package.module:make") and places.is_place("hf:org/model@main")
    with pytest.raises(UserError, match="did you mean 'input_size'"):
        ur_jax.load_encoder("timm:resnet18,input_sise=3")
