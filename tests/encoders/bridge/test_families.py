"""Families of networks at reduced size: output, gradient, and their images byte for byte.

Skipped where transformers or timm is not installed: pip install "ur_jax[hf,timm]".
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import tarfile
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import ur_jax
from ur_jax import data
from ur_jax.encoders.bridge import families, packages, places, sweep
from ur_jax.encoders.bridge.module import _picked, from_torch
from ur_jax.errors import UserError

torch = pytest.importorskip("torch")
if not all(map(importlib.util.find_spec, ("transformers", "timm"))):
    pytest.skip('needs pip install "ur_jax[hf,timm]"', allow_module_level=True)

VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
FAMILIES = {
    "Dinov2WithRegisters": {**VISION, "num_register_tokens": 2},
    "DINOv3ViT": {**VISION, "num_register_tokens": 2, "use_gated_mlp": True},
    "CLIPVision": {**VISION, "projection_dim": 12, "hidden_act": "quick_gelu"},
    "SiglipVision": VISION,
    "Aimv2Vision": VISION,
}
TIMM = """test_vit test_vit3 test_resnet test_convnext test_efficientnet test_efficientnet_gn
    test_nfnet test_mambaout test_byobnet test_maxvit test_coatnet test_vit_relpos""".split()


def saved(name, folder):
    """A folder as `save_pretrained` writes it."""
    transformers: Any = packages.import_transformers()
    torch.manual_seed(0)
    kind = f"{name}ModelWithProjection" if name == "CLIPVision" else f"{name}Model"
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**FAMILIES[name]))
    sweep.randomised(model).save_pretrained(folder)
    return str(folder)


def compared(module, encoder, output, size):
    """(error of the representation, of the image gradient) against PyTorch."""
    picked = _picked(torch, module, size, output, "it")
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        want = picked(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    got = np.asarray(jax.jit(encoder.apply_fn)(encoder.params, images))
    return np.abs(got - want).max() / np.abs(want).max(), sweep.gradient_difference(
        picked, encoder, images
    )


@pytest.mark.parametrize("name", list(FAMILIES))
def test_families_are_pytorchs(name, tmp_path):
    made = places._of_hub(saved(name, tmp_path / "it"), {})
    settings = made.settings
    encoder = from_torch(made.module, **settings, check=False)
    errors = compared(made.module, encoder, settings["output"], settings["input_size"])
    assert max(errors) < 1e-5


def test_clips_projection_and_tower(tmp_path):
    place = f"hf:{saved('CLIPVision', tmp_path / 'it')}"
    projected, tower = ur_jax.load_encoder(place), ur_jax.load_encoder(place, None, "backbone")
    assert (projected.dimension, tower.dimension, tower.representation) == (12, 16, "backbone")
    images = np.random.default_rng(0).random((2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(projected(images), axis=1), 1, rtol=1e-5)
    assert projected.mean == families.CLIP_MEAN
    weights = tmp_path / "it" / "model.safetensors"
    config = tmp_path / "it" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "vit"}))
    with pytest.raises(UserError, match="do not fit ViTModel"):
        ur_jax.load_encoder(place)
    weights.write_bytes(b"short")
    with pytest.raises(UserError):
        ur_jax.load_encoder(place)


@pytest.mark.parametrize("name", TIMM)
def test_timms_architectures(name):
    timm: Any = packages.import_timm()
    torch.manual_seed(0)
    module = sweep.randomised(timm.create_model(name, num_classes=0))
    size = (160, 160) if "vit" in name or "coat" in name else (64, 64)
    encoder = from_torch(module, input_size=size, check=False)
    picked = _picked(torch, module, size, None, name)
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        want = picked(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    fast: Any = {"xla_backend_optimization_level": 0}
    got = jax.jit(encoder.apply_fn, compiler_options=fast)(encoder.params, images)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-5


@pytest.fixture
def order(monkeypatch):
    """Pillow's order of passes before version 13, which is ours: along rows first."""
    whole = Image.Image.resize

    def resize(self, size, *args, **keywords):
        rows = whole(self, (size[0], self.height), *args, **keywords)
        return whole(rows, tuple(size), *args, **keywords)

    yield lambda function: _with(monkeypatch, resize, function)


def _with(monkeypatch, resize, function):
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        return function()


def pictures():
    """Pictures with odd sides, in both orientations."""
    rng = np.random.default_rng(0)
    for height, width in ((301, 400), (433, 290), (257, 257), (224, 640)):
        small = rng.integers(0, 256, (height // 7, width // 7, 3), np.uint8)
        yield Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photographs(shared_dir):
    """A few real ones; `UR_JAX_PHOTOGRAPHS=250` takes all."""
    with tarfile.open(shared_dir / "data" / "photos.tar") as file:
        members = [m for m in file if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg"))]
        chosen = members[:: max(1, len(members) // int(os.environ.get("UR_JAX_PHOTOGRAPHS", "4")))]
        read = lambda member: Image.open(io.BytesIO(file.extractfile(member).read()))  # pyright: ignore
        return [read(member).convert("RGB") for member in chosen]


def processors():
    """Pillow processors of transformers, with their settings as they are saved."""
    for family, kind, settings in (
        ("clip", "CLIP", {}),
        ("bit", "Bit", {"size": {"shortest_edge": 256}}),
        ("siglip", "Siglip", {}),
        ("vit", "ViT", {}),
        ("convnext", "ConvNext", {"size": {"shortest_edge": 224}}),
    ):
        module = importlib.import_module(
            f"transformers.models.{family}.image_processing_pil_{family}"
        )
        yield getattr(module, f"{kind}ImageProcessorPil")(**settings)


def test_images_are_transformers_byte_for_byte(order, photographs):
    packages.import_transformers()
    for processor in processors():
        images = families.images_of_processor(processor.to_dict(), "it")
        for picture in (*pictures(), *photographs):
            plain = {"do_normalize": False, "do_rescale": False}
            want = order(lambda: processor(picture, **plain)["pixel_values"][0])  # noqa: B023
            got = data.prepare(picture, input_size=images.size, preparation=images.preparation)
            np.testing.assert_array_equal(np.moveaxis(np.asarray(want), 0, -1), got)


def test_images_are_timms_byte_for_byte(order, photographs):
    timm: Any = packages.import_timm()
    for name in ("resnet18", "vit_small_patch16_224", "vit_base_patch16_clip_224", "convnext_atto"):
        config = timm.get_pretrained_cfg(name).to_dict()
        config = timm.data.resolve_data_config(pretrained_cfg=config)
        images = families.images_of_timm(config, name)
        transform = timm.data.create_transform(**{**config, "mean": (0,) * 3, "std": (1,) * 3})
        for picture in (*pictures(), *photographs):
            made = order(lambda: transform(picture).numpy())  # noqa: B023
            want = np.rint(made * 255).astype(np.uint8)
            got = data.prepare(picture, input_size=images.size, preparation=images.preparation)
            np.testing.assert_array_equal(np.moveaxis(want, 0, -1), got)


@pytest.mark.parametrize(
    "name, message",
    [
        ("GatedRepoError", "is gated: accept its terms.*hf auth login"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("RepositoryNotFoundError", "no model of that name on the hub"),
        ("LocalEntryNotFoundError", "the hub cannot be reached.*give its folder"),
    ],
)
def test_what_a_hub_answers_is_one_line(name, message, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(pytest.importorskip("huggingface_hub.errors"), name)

    def answer(*arguments, **keywords):
        raise kind.__new__(kind)  # which takes a whole response otherwise

    monkeypatch.setattr(hub, "snapshot_download", answer)
    with pytest.raises(UserError, match=message) as refused:
        ur_jax.load_encoder("hf:group/name@v9")
    assert "\n" not in str(refused.value)
