"""Training augmentations against Pillow's bytes, torchvision's distributions and NumPy twins."""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from ur_jax import devices, training
from ur_jax.training import operations as ops
from ur_jax.training import views

NUM_DRAWS = 5000
CHUNK = 500
MAX_Z = 4.0
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PIPELINES = {
    "mocov2": views.MOCO_V2,
    "mocov3_1": views.MOCO_V3_VIEW1,
    "mocov3_2": views.MOCO_V3_VIEW2,
}
# Pillow's bytes minus float, in units of 1/255, as the README of the golden data tabulates
# them: mean from, to; root mean square from, to; maximum.
BLENDS = (-0.57, -0.22, 0.36, 0.64, 1.2)
HUES = (0.15, 0.88, 0.6, 2.1, 8.1)
SEQUENCE = (0.42, 0.42, 1.7, 1.7, 6.7)
ROUNDED = (0.0, 0.12, 0.29, 0.37, 1.0)
BLURS = (-0.01, 0.04, 0.0, 0.83, 5.8)
EXACT = (0.0, 0.0, 0.0, 0.0, 0.0)

KEY = jax.random.key(2022)

sample_view = jax.jit(views.sample_view, static_argnames=("height", "width", "config"))
augment = jax.jit(views.augment, static_argnames="config")
color_jitter = jax.jit(ops.color_jitter)
crop_and_resize = jax.jit(ops.crop_and_resize, static_argnames="size")
gaussian_blur = jax.jit(ops.gaussian_blur, static_argnames="radius")
OPTIMISED = {"xla_backend_optimization_level": 1}  # pays for thousands of views


@pytest.fixture
def statistics(golden_dir):
    """The recorded distributions."""
    return json.loads((golden_dir / "augmentation.json").read_text())


def only(**fields):
    """A configuration that takes the whole image and does nothing but what is named."""
    whole = {"size": (32, 32), "area": (1.0, 1.0), "aspect": (1.0, 1.0), "flip_probability": 0.0}
    return views.AugmentConfig(**whole | fields)


def jitter_of(*operations):
    """A batch of one jitter that applies (operation, factor) pairs in the order given."""
    factors = np.float32([1, 1, 1, 0])
    for operation, factor in operations:
        factors[operation] = factor
    named = [operation for operation, _ in operations]
    order = np.int32(named + [operation for operation in range(4) if operation not in named])
    return ops.Jitter(order[None], factors[None])


def sample_views(height, width, config):
    """NUM_DRAWS views as NumPy arrays."""
    sample = functools.partial(sample_view, height=height, width=width, config=config)
    return jax.tree.map(np.asarray, jax.vmap(sample)(jax.random.split(KEY, NUM_DRAWS)))


def measured(chunks):
    """The statistics of views that come in chunks."""
    parts = [jax.tree.map(np.asarray, view_statistics(views)) for views in chunks]
    samples = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert samples.pop("in_range").all()
    return samples


@functools.partial(jax.jit, compiler_options=OPTIMISED)
def view_statistics(images):
    """The recorded quantities of each image, and whether it lies in [0, 1]."""
    means, deviations = images.mean((1, 2)), images.std((1, 2))
    return {
        **{f"mean_{c}": means[:, i] for i, c in enumerate("rgb")},
        **{f"std_{c}": deviations[:, i] for i, c in enumerate("rgb")},
        "gradient_energy": (jnp.diff(images, axis=2) ** 2).mean((1, 2, 3)),
        "grey_fraction": (images == images[..., :1]).all((1, 2, 3)),
        "in_range": ((images >= 0) & (images <= 1)).all((1, 2, 3)),
    }


def summary(values):
    """The recorded quantities of a sample, each with its standard error."""
    n = len(values)
    if values.dtype == bool:
        return {"value": (values.mean(), values.std() / np.sqrt(n))}
    values = values.astype(np.float64)
    mean, std = values.mean(), values.std()
    fourth = ((values - mean) ** 4).mean()
    quantities = {
        "mean": (mean, std / np.sqrt(n)),
        "std": (std, np.sqrt((fourth - std**4) / n) / (2 * std)),
    }
    for q in QUANTILES:
        # The number of values below a quantile is binomial.
        level_error = np.sqrt(q * (1 - q) / n)
        low, value, high = np.quantile(values, (q - level_error, q, q + level_error))
        quantities[f"q{100 * q:02.0f}"] = (value, (high - low) / 2)
    return quantities


def assert_distributed(recorded, samples, step=0.0):
    """Compares each quantity by its z-score; a discrete one may be off by one step."""
    scores = {}
    for name, entry in recorded.items():
        entry = entry if "value" not in entry else {"value": entry}
        for quantity, (value, error) in summary(samples[name]).items():
            want = entry[quantity]
            gap = abs(value - want["value"] - want.get("float_minus_pil", 0.0))
            if 0 in (want["se"], error):
                assert gap <= step, f"{name} {quantity}: {value} against {want}"
            else:
                scores[f"{name} {quantity}"] = gap / np.hypot(error, want["se"])
    worst = max(scores, key=scores.get)
    print(f"largest z of {len(scores)}: {scores[worst]:.2f} ({worst})")
    assert scores[worst] <= MAX_Z, f"{worst} is {scores[worst]:.1f} standard errors off"


BYTE_TESTS = {
    **{f"brightness_{f}": (jitter_of((0, f)), BLENDS) for f in (0.6, 1.4)},
    **{f"contrast_{f}": (jitter_of((1, f)), BLENDS) for f in (0.6, 1.4)},
    **{f"saturation_{f}": (jitter_of((2, f)), BLENDS) for f in (0.6, 1.4)},
    **{f"hue_{f}": (jitter_of((3, f)), HUES) for f in (-0.1, -0.03, 0.05, 0.1)},
    "jitter_sequence": (jitter_of((3, 0.07), (1, 0.7), (0, 1.3), (2, 0.8)), SEQUENCE),
    "grayscale": (None, ROUNDED),
    "solarize": (None, EXACT),
    **{f"blur_{sigma}": (sigma, BLURS) for sigma in (0.1, 0.5, 0.9, 1.4, 2.0)},
    "crop_0_0_64_64": ((0, 0, 64, 64), ROUNDED),
    "crop_5_9_40_30": ((5, 9, 40, 30), ROUNDED),
    "crop_20_3_17_25": ((20, 3, 17, 25), ROUNDED),
}


@pytest.mark.parametrize("name", BYTE_TESTS)
def test_operation_matches_pillow(golden, name):
    parameter, (mean_low, mean_high, rms_low, rms_high, largest) = BYTE_TESTS[name]
    stored, kind = golden("augmentation_ops.npz"), name.split("_")[0]
    source = stored["image_64" if kind == "crop" else "image_32"]
    images = jnp.asarray(source[None] / np.float32(255))
    if kind == "crop":
        box = ops.Crop(*(jnp.array([n]) for n in parameter))
        ours = crop_and_resize(images, box, jnp.array([False]), size=(32, 32))
    elif kind == "blur":
        ours = gaussian_blur(images, jnp.array([parameter]), radius=8)
    elif kind == "grayscale":
        ours = ops.grayscale(images)
    elif kind == "solarize":
        ours = augment(images, jax.random.key(0), config=only(solarize_probability=1.0))
    else:
        ours = color_jitter(images, parameter)
    gap = stored[name] - 255 * np.asarray(ours[0], np.float64)
    # The table is rounded to two digits.
    assert mean_low - 0.015 <= gap.mean() <= mean_high + 0.015
    assert rms_low - 0.05 <= np.sqrt((gap**2).mean()) <= rms_high + 0.05
    assert abs(gap).max() <= largest + 0.05


def hue_twin(images, shift):
    """Shifts hue pixel by pixel with the standard library."""
    shifted = np.empty_like(images)
    for index in np.ndindex(images.shape[:-1]):
        hue, saturation, value = colorsys.rgb_to_hsv(*images[index])
        shifted[index] = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
    return shifted


def test_jitter_applies_every_order():
    orders = np.int32(list(itertools.permutations(range(4))))
    rng = np.random.default_rng(1)
    images = rng.random((len(orders), 5, 4, 3)) ** 2
    factors = np.array([1, 1, 1, 0]) + [0.6, 0.6, 0.6, 0.3] * rng.uniform(-1, 1, (len(orders), 4))
    weights = np.array([0.299, 0.587, 0.114])
    want = images.copy()
    for image, order, factor in zip(want, orders, factors, strict=True):
        for operation in order:
            grey = (image @ weights)[..., None]
            if operation == 3:
                image[:] = hue_twin(image, factor[3])
            else:
                base, f = (0.0, grey.mean(), grey)[operation], factor[operation]
                image[:] = np.clip(f * image + (1 - f) * base, 0, 1)
    jitter = ops.Jitter(jnp.array(orders), jnp.array(factors, jnp.float32))
    got = color_jitter(jnp.array(images, jnp.float32), jitter)
    np.testing.assert_allclose(got, want, atol=3e-6)


@pytest.mark.parametrize(("sigma", "shape"), [(0.3, (7, 2)), (1.0, (9, 6)), (2.0, (5, 24))])
def test_blur_equals_scipy(sigma, shape):
    image = np.random.default_rng(2).random((*shape, 3))
    want = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest", truncate=16)
    images = jnp.array(image[None], jnp.float32)
    got = gaussian_blur(images, jnp.array([sigma]), radius=20)[0]
    np.testing.assert_allclose(got, want, atol=1e-6)


def resize_twin(image, height, width):
    """Pillow's bilinear rule in float64, one output pixel at a time."""
    for axis, out in ((0, height), (1, width)):
        lines = np.moveaxis(image, axis, 0)
        scale = len(lines) / out
        support = max(1.0, scale)
        resized = []
        for i in range(out):
            centre = (i + 0.5) * scale
            pixels = np.arange(
                max(0, int(centre - support + 0.5)), min(len(lines), int(centre + support + 0.5))
            )
            weights = np.maximum(0, 1 - abs(pixels - centre + 0.5) / support)
            resized.append(np.tensordot(weights / weights.sum(), lines[pixels], 1))
        image = np.moveaxis(np.array(resized), 0, axis)
    return image


def test_crop_equals_twin_and_sees_nothing_outside():
    boxes = [(0, 0, 13, 17), (2, 5, 4, 9), (1, 0, 12, 3), (6, 16, 1, 1)]
    image = np.random.default_rng(3).random((13, 17, 3))
    images = np.full((len(boxes), *image.shape), 1e30)
    for target, (top, left, height, width) in zip(images, boxes, strict=True):
        inside = np.s_[top : top + height, left : left + width]
        target[inside] = image[inside]
    crop = ops.Crop(*jnp.array(boxes).T)
    flip = jnp.array([False, True, False, True])
    got = crop_and_resize(jnp.array(images, jnp.float32), crop, flip, size=(6, 8))
    for view, (top, left, height, width), flipped in zip(got, boxes, flip, strict=True):
        want = resize_twin(image[top : top + height, left : left + width], 6, 8)
        np.testing.assert_allclose(view, want[:, ::-1] if flipped else want, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "area", "aspect", "box"),
    [
        ((10, 100), (0.9, 1.0), (3 / 4, 4 / 3), (0, 43, 10, 13)),  # too wide: centred
        ((100, 10), (0.9, 1.0), (3 / 4, 4 / 3), (43, 0, 13, 10)),  # too tall
        ((30, 40), (1.0, 1.0), (2.0, 4.0), (5, 0, 20, 40)),  # not wide enough
        ((21, 21), (1.0, 1.0), (1.0, 1.0), (0, 0, 21, 21)),  # the whole image fits
    ],
)
def test_crop_without_choice(shape, area, aspect, box):
    config = views.AugmentConfig(area=area, aspect=aspect)
    assert tuple(map(int, sample_view(KEY, *shape, config=config).crop)) == box


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (375, 500)])
def test_crop_distribution(statistics, scale, height, width):
    config = views.AugmentConfig(area=scale)
    box = ops.Crop(*map(np.float64, sample_views(height, width, config).crop))
    assert (box.top >= 0).all() and (box.top + box.height <= height).all()
    assert (box.left >= 0).all() and (box.left + box.width <= width).all()
    samples = {
        "area_fraction": box.height * box.width / (height * width),
        "log_aspect_ratio": np.log(box.width / box.height),
        "centre_y": (box.top + box.height / 2) / height,
        "centre_x": (box.left + box.width / 2) / width,
        "whole_image_fraction": (box.height == height) & (box.width == width),
    }
    recorded = statistics["random_resized_crop"][f"scale_{scale[0]:.2f}_1_{height}x{width}"]
    assert_distributed(recorded, samples, step=1 / height)


@pytest.mark.parametrize("saturation", [0.4, 0.2])
def test_jitter_distribution(statistics, golden, saturation):
    config = dataclasses.replace(views.MOCO_V2, saturation=saturation, jitter_probability=1.0)
    image = golden("augmentation_ops.npz")["image_64"] / np.float32(255)
    images = np.broadcast_to(image, (CHUNK, *image.shape))
    jitter = sample_views(64, 64, config).jitter
    rows = [slice(start, start + CHUNK) for start in range(0, NUM_DRAWS, CHUNK)]
    apply = jax.jit(ops.color_jitter, compiler_options=OPTIMISED)
    chunks = (apply(images, ops.Jitter(*(leaf[row] for leaf in jitter))) for row in rows)
    recorded = statistics["color_jitter"][f"0.4_0.4_{saturation}_0.1"]
    assert_distributed(recorded, measured(chunks))


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_distribution(statistics, golden, name):
    config = PIPELINES[name].at((32, 32))
    image = golden("augmentation_ops.npz")["image_64"] / np.float32(255)
    images = np.broadcast_to(image, (CHUNK, *image.shape))
    keys = jax.random.split(KEY, NUM_DRAWS // CHUNK)
    apply = jax.jit(functools.partial(views.augment, config=config), compiler_options=OPTIMISED)
    chunks = (apply(images, key) for key in keys)
    assert_distributed(statistics["pipelines"][name], measured(chunks))


def test_switches_distribution(statistics):
    view = sample_views(64, 64, views.MOCO_V3_VIEW2)
    samples = {
        "flip_fraction": view.flip,
        "grey_fraction": view.grey,
        "blur_sigma": view.sigma,
    }
    assert_distributed(statistics["other"], samples)
    jittered = (view.jitter.factors != np.float32([1, 1, 1, 0])).any(-1)
    # A binomial of 5000 draws is within four standard errors of its probability.
    for values, probability in ((jittered, 0.8), (view.blur, 0.1), (view.solarize, 0.2)):
        error = np.sqrt(probability * (1 - probability) / NUM_DRAWS)
        assert abs(values.mean() - probability) <= MAX_Z * error
    # Each of the 24 orders is as likely as the others.
    _, counts = np.unique(view.jitter.order, axis=0, return_counts=True)
    assert stats.chisquare(np.pad(counts, (0, 24 - len(counts)))).pvalue > 1e-4


def test_recipes_differ_in_the_published_numbers():
    v2, first, second = views.MOCO_V2, views.MOCO_V3_VIEW1, views.MOCO_V3_VIEW2
    assert (v2.area, v2.saturation, v2.blur_probability) == ((0.2, 1.0), 0.4, 0.5)
    assert (first.area, first.saturation, first.blur_probability) == ((0.08, 1.0), 0.2, 1.0)
    assert (second.blur_probability, second.solarize_probability) == (0.1, 0.2)
    assert (v2.solarize_probability, first.solarize_probability) == (0.0, 0.0)
    small = v2.at((32, 16), blur_scale=0.5)
    assert small == dataclasses.replace(v2, size=(32, 16), blur_sigma=(0.05, 1.0))


def test_without_operations_nothing_changes_but_the_flip():
    images = np.random.default_rng(4).random((16, 8, 8, 3), np.float32)
    compiled = augment._cache_size()
    seen = augment(images, KEY, config=only(size=(8, 8), flip_probability=0.5))
    again = augment(images, KEY, config=only(size=(8, 8), flip_probability=0.5))
    assert augment._cache_size() == compiled + 1  # equal configurations share a compilation
    seen = np.asarray(seen)
    np.testing.assert_array_equal(again, seen)
    same = (seen == images).all((1, 2, 3))
    mirrored = (seen == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all() and same.any() and mirrored.any()


def test_views_do_not_depend_on_batching_or_devices():
    # Without jitter, whose compilation is long; test_jitter_applies_every_order mixes rows.
    config = dataclasses.replace(views.MOCO_V2.at((8, 8)), jitter_probability=0.0)
    images = np.random.default_rng(5).random((24, 12, 10, 3), np.float32)
    mesh = devices.data_mesh()
    assert mesh.size == 8
    spread = np.asarray(augment(devices.shard(mesh, images), KEY, config=config))
    assert spread.shape == (24, 8, 8, 3) and spread.dtype == np.float32

    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(24))
    part = np.asarray(augment(images[5:16], keys[5:16], config=config))
    np.testing.assert_allclose(part, spread[5:16], atol=1e-6)

    other = augment(images[5:16], jax.random.split(KEY, 11), config=config)
    assert (abs(other - part).max((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (224,)}, "a tuple of 2: an integer, an integer"),
        ({"size": (224, 1)}, ">= 2"),
        ({"area": (0.0, 1.0)}, "0 < low <= high <= 1"),
        ({"area": (0.2, 1.5)}, "0 < low <= high <= 1"),
        ({"aspect": (4 / 3, 3 / 4)}, "aspect as"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma as"),
        ({"blur_sigma": (0.1, float("inf"))}, "blur_sigma as"),
        ({"brightness": -0.1}, r"brightness in \[0, 1\], got -0.1"),
        ({"hue": 0.6}, r"hue in \[0, 0.5\], got 0.6"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"blur_probability": float("nan")}, "blur_probability"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        views.AugmentConfig(**fields)


def test_input_errors():
    images = jnp.zeros((2, 8, 8, 3))
    for wrong in (images[0], images[..., :1], images.astype(jnp.uint8)):
        with pytest.raises(ValueError, match="Expected images"):
            augment(wrong, KEY, config=views.PROBE)
    for wrong in (jnp.zeros(2, jnp.uint32), jax.random.split(KEY, 3)):
        with pytest.raises(ValueError, match="Expected one typed key"):
            augment(images, wrong, config=views.PROBE)


def test_noise_is_of_its_size_and_changes_no_other_stream():
    images, key = jnp.full((8, 16, 16, 3), 0.5), jax.random.key(0)
    noisy = views.augment(images, key, config=only(noise=0.1))
    assert abs(float(jnp.std(noisy)) - 0.1) < 0.005  # 6144 numbers: 5 standard errors
    assert abs(float(jnp.mean(noisy)) - 0.5) < 0.007
    assert not np.array_equal(noisy[0], noisy[1])
    first, _ = training.LoreConfig(noise=0.25).views((16, 16))
    assert first.noise == 0.25 and training.FareConfig().views((16, 16))[0].noise == 0.0
