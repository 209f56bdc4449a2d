"""Arguments without sense: each is refused in one line, or means something; none is a traceback."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from given_images import Given, flat, make_encoder
from PIL import Image

from ur_jax import data
from ur_jax.data import corruptions
from ur_jax.data.probe_views import CropConfig, random_view
from ur_jax.errors import UserError, shown

JUNK: list[Any] = [
    None, "", "x", "resize", b"x", -1, 0, 1, 3, 10**30, -0.0, 2.5, 1e-300, float("nan"),
    float("inf"), -float("inf"), True, 1j, [], (), {}, set(), (1,), (1, 2), (0, 0), (-1, 5),
    (2.5, 2), (None, 1), (10**9, 10**9), (float("nan"), 1.0), ("a", "b"), [1, 2, 3], object(), int,
    np.zeros(3), np.zeros((2, 2)), np.float32(1), np.int64(2), np.array(2), np.array(["a"]),
    np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), np.nan, np.float32), np.datetime64("NaT"),
    flat(1), Image.new("L", (0, 3)), lambda: 1, "folder:", "folder:/nowhere", "folder:\0", "demo:",
    "tfds:", ":", "::", "demo\n", "tfds:x/y", "\udcff", "folder:\udcff", "~",
]  # fmt: skip

SMALL = {"input_size": (4, 4), "preparation": "resize"}
GIVEN = Given(np.zeros((6, 6, 3), np.uint8), np.ones((6, 6, 3), np.uint8))
RNG = np.random.default_rng(0)
ENCODER = make_encoder((4, 4))
PIXELS = np.zeros((4, 4, 3), np.uint8)

CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "open_images": (data.open_images, {"spec": "demo"}),
    "FolderSource": (data.FolderSource, {"place": "."}),
    "CachedImages": (data.CachedImages, {"source": GIVEN, "folder": "cache"}),
    "DemoSource": (data.DemoSource, {"place": ""}),
    "evenly_spaced": (data.evenly_spaced, {"total": 5, "n": 3}),
    "check_workers": (data.check_workers, {"num_workers": 0}),
    "check_batch_size": (
        data.check_batch_size, {"batch_size": 2, "num_images": 9, "input_size": (4, 4)}
    ),
    "image_batches": (
        lambda **a: list(data.image_batches(**a)),
        {"source": GIVEN, "indices": [0, 1], "batch_size": 2, "start": 0, **SMALL},
    ),
    "load_uint8": (data.load_uint8, {"source": GIVEN, "indices": [0, 1], **SMALL}),
    "prepare": (data.prepare, {"image": flat(1), **SMALL}),
    "resize": (data.resize, {"image": flat(1), "size": (4, 4)}),
    "resize_shorter": (data.resize_shorter, {"image": flat(1), "shorter": 4}),
    "central_crop": (data.central_crop, {"image": flat(1), "size": (4, 4)}),
    "resize_crop": (data.resize_crop, {"image": flat(1), "size": (4, 4)}),
    "ViewConfig": (
        data.ViewConfig, {"kind": "noisy", "sigma": 0.1, "radius": 3.0, "augment": True}
    ),
    "CropConfig": (
        CropConfig, {"area": (0.5, 1.0), "aspect": (1.0, 1.0), "flip_probability": 0.5}
    ),
    "random_view": (
        random_view, {"image": flat(1), "rng": RNG, "size": (4, 4), "config": CropConfig()}
    ),
    "low_pass": (corruptions.low_pass, {"image": PIXELS, "radius": 2.0}),
    "add_noise": (corruptions.add_noise, {"image": PIXELS, "rng": RNG, "sigma": 0.1}),
    "ProbeViews": (
        lambda **a: data.ProbeViews(**a)[0],
        {"source": GIVEN, "encoder": ENCODER, "config": data.ViewConfig("noisy"), "random": True,
         "seed": 0, "draw": 0},
    ),
    "ShuffledImages": (
        lambda **a: list(data.ShuffledImages(**a).epoch(0)),
        {"source": GIVEN, "indices": [0, 1], "batch_size": 2, "seed": 0, "process": 0,
         "num_processes": 1, **SMALL},
    ),
    "epoch": (
        lambda **a: list(
            data.ShuffledImages(GIVEN, np.arange(2), batch_size=2, seed=0, **SMALL).epoch(**a)
        ),
        {"number": 0, "start": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_ends_in_a_traceback(name):
    function, arguments = CALLS[name]
    wrong = []
    for argument in arguments:
        for junk in JUNK:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(**{**arguments, argument: junk})
            except UserError as error:
                if "\n" in str(error):
                    wrong.append(f"{argument}={shown(junk)}: more than a line: {error}")
            except Exception as error:
                wrong.append(f"{argument}={shown(junk)}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
