"""Low-pass filter, noise and crops of the probes against the reference's bytes and statistics."""

from __future__ import annotations

import dataclasses
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_rules
from given_images import Given, make_encoder
from PIL import Image

from ur_jax.certify.sampling import noisy_samples
from ur_jax.data import ProbeViews, ViewConfig, corruptions, image_batches, prepare
from ur_jax.data.probe_views import CropConfig, random_box, random_view
from ur_jax.training import views


@pytest.mark.parametrize("name", ["0", "1", "blocks"])
def test_low_pass_gives_the_reference_bytes(golden, name):
    stored = golden("lowpass.npz")
    if name == "blocks":
        image = np.random.default_rng([0, 17]).integers(0, 2, (14, 14, 3)) * 255
        image = image.repeat(16, 0).repeat(16, 1).astype(np.uint8)
    else:
        image = np.rint(255 * reference_rules.image(int(name), 224, 224)).astype(np.uint8)
    assert zlib.crc32(image.tobytes()) == stored[f"input_crc32_{name}"]
    result = corruptions.low_pass(image, radius=50)
    np.testing.assert_array_equal(result[80:144, 80:144], stored[f"crop_{name}"])
    np.testing.assert_allclose(result.mean((0, 1)), stored[f"mean_{name}"], rtol=1e-12)
    assert zlib.crc32(result.tobytes()) == stored[f"crc32_{name}"]


def test_low_pass_at_another_size_keeps_a_wave_inside_the_disc_only():
    x = np.arange(32)
    wave = np.rint(128 + 60 * np.cos(2 * np.pi * 3 * x / 32)).astype(np.uint8)
    image = np.broadcast_to(wave[None, :, None], (24, 32, 3))
    kept, removed = (corruptions.low_pass(image, radius=r).astype(int) for r in (3.01, 3.0))
    assert np.abs(kept - image).max() <= 2 and np.ptp(removed) <= 1  # rounding of `image`
    # The radius of a probe at 32 pixels is 50 / 224 of the height.
    views = ProbeViews(
        Given(np.ascontiguousarray(image)), make_encoder((32, 32)), ViewConfig("low_pass"),
        random=False,
    )  # fmt: skip
    whole = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((32, 32), 2))
    expected = corruptions.low_pass(whole, radius=50 * 32 / 224)
    np.testing.assert_array_equal(np.asarray(views[0].pixels), expected)


def test_the_probes_noise_comes_before_resizing_and_the_certificates_after():
    """Noise is smoothed to 0.82 of its size along the width, and lowers the mean by 0.5/255."""
    sigma, grey = 0.05, np.full((224, 224, 3), 128, np.uint8)  # so little that nothing is clipped
    views = ProbeViews(
        Given(grey, grey), make_encoder((224, 244)), ViewConfig("noisy", sigma=sigma), random=False
    )
    noisy = np.asarray(views[0].pixels) / 255.0
    assert noisy.std() == pytest.approx(sigma, rel=0.01)
    assert noisy.mean() - 128 / 255 == pytest.approx(-0.5 / 255, abs=0.1 * 0.5 / 255 + 4e-4)
    batch = next(
        image_batches(
            views, [0, 1], input_size=(224, 244), preparation=views.preparation, batch_size=2
        )
    )
    ratio = batch.images.std() / noisy.std()
    assert ratio == pytest.approx(0.82, abs=0.01)
    # Independent by image and by draw, and the same when drawn again.
    again = ProbeViews(
        Given(grey),
        make_encoder((224, 244)),
        ViewConfig("noisy", sigma=sigma),
        random=False,
        draw=1,
    )
    np.testing.assert_array_equal(np.asarray(views[0].pixels) / 255.0, noisy)
    for other in (views[1], again[0]):
        assert abs(np.corrcoef(np.asarray(other.pixels).ravel(), noisy.ravel())[0, 1]) < 0.02

    certified = np.asarray(
        noisy_samples(
            jnp.full((1, 224, 244, 3), 128 / 255), jax.random.key(0), jnp.zeros(1, jnp.int32),
            jnp.zeros(1, jnp.int32), sigma=sigma, clip=True,
        )
    )  # fmt: skip
    assert certified.std() == pytest.approx(sigma, rel=0.01)
    assert abs(certified.mean() - 128 / 255) < 4 * sigma / np.sqrt(certified.size)
    assert len(np.unique(certified)) > 10_000  # not quantised


@pytest.mark.parametrize(
    "operation, input_size, preparation",
    [("probe_224x244", (224, 244), "resize"), ("probe_simclrv2", (224, 224), "resize_crop")],
)
def test_clean_test_images_are_the_reference_bytes(golden, operation, input_size, preparation):
    stored = golden("preprocess.npz")
    names, column = list(stored["names"]), list(stored["operations"]).index(operation)
    row = next(i for i, name in enumerate(names) if name.startswith("rgb_"))
    height, width = map(int, names[row].removeprefix("rgb_").split("x"))
    image = np.rint(255 * reference_rules.image(row, height, width, stream=15)).astype(np.uint8)
    encoder = make_encoder(input_size, preparation)
    views = ProbeViews(Given(image), encoder, ViewConfig(), random=False)
    assert views.size == (224, 224)
    result = prepare(views[0].pixels, input_size=input_size, preparation=views.preparation)
    assert zlib.crc32(np.ascontiguousarray(result).tobytes()) == stored["crc32"][row, column]


def test_random_crops_have_the_reference_statistics(golden_dir):
    stored = json.loads((golden_dir / "augmentation.json").read_text())
    stored = stored["random_resized_crop"]
    rng, n = np.random.default_rng(0), 4000
    for height, width in ((64, 64), (375, 500)):
        name = next(k for k in stored if "0.08" in k and f"{height}x{width}" in k)
        boxes = np.array([random_box(rng, height, width, CropConfig()) for _ in range(n)])
        top, left, h, w = boxes.T
        assert (top >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
        quantities = {
            "area_fraction": h * w / (height * width),
            "log_aspect_ratio": np.log(w / h),
            "centre_y": (top + h / 2) / height,
            "centre_x": (left + w / 2) / width,
        }
        for quantity, values in quantities.items():
            mean, spread = (stored[name][quantity][k] for k in ("mean", "std"))
            error = np.hypot(mean["se"], values.std() / np.sqrt(n))
            assert abs(values.mean() - mean["value"]) < 4 * error, (name, quantity)
            assert values.std() == pytest.approx(spread["value"], rel=0.05)


def test_a_probes_crops_are_those_of_training():
    """Drawn here by NumPy on the host and there by JAX on the device, from one distribution."""
    for field in dataclasses.fields(CropConfig):
        assert getattr(CropConfig(), field.name) == getattr(views.PROBE, field.name)


def test_views_flip_half_and_fall_back_to_the_centre():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    whole = CropConfig(area=(1.0, 1.0), aspect=(1.0, 1.0))
    flipped = 0
    for seed in range(200):
        view = np.asarray(random_view(image, np.random.default_rng(seed), (4, 4), whole))
        is_same = np.array_equal(view, np.asarray(image))
        assert is_same or np.array_equal(view[:, ::-1], np.asarray(image))
        flipped += not is_same
    assert 70 < flipped < 130  # 4 standard deviations
    # No box of area 1 and ratio 3/4 to 4/3 fits into 10 x 40.
    wide = CropConfig(area=(1.0, 1.0))
    assert random_box(np.random.default_rng(0), 10, 40, wide) == (0, 13, 10, 13)


@pytest.mark.parametrize("change", [{"kind": "noise"}, {"sigma": 0.0}, {"radius": -1.0}])
def test_bad_views_are_refused(change):
    with pytest.raises(ValueError, match="Expected"):
        ViewConfig(**change)
