"""Kinds of images and of corruptions from a file outside the package."""

from __future__ import annotations

import json
import os
import sys

import jax
import numpy as np
import pytest
import tiny_encoder
from given_images import Given, make_encoder
from PIL import Image

from ur_jax import cli, data, registry

PLUGIN = """
import numpy as np
from PIL import Image

from ur_jax import data


class Noise(data.ImageSource):
    class_names = ("noise",)

    def __init__(self, place):
        self.spec, self.number = f"test-noise:{place}", int(place)

    def __len__(self):
        return self.number

    def name(self, index):
        return f"noise {index}"

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        return data.Example(Image.fromarray(pixels), 0, self.name(index))


data.SOURCES.register("test-noise", Noise)


@data.corruption("test-inverted")
def inverted(view, rng, config):
    return 255 - view
"""


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "kinds_of_images_for_a_test.py"
    path.write_text(PLUGIN)
    yield path
    sys.modules.pop(path.stem, None)
    for kinds, name in ((data.SOURCES, "test-noise"), (data.CORRUPTIONS, "test-inverted")):
        kinds._items.pop(name, None)


def test_a_source_from_a_file_works_on_the_command_line(plugin, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", jax.device_count)  # as many devices as there are already
    words = [
        "--encoder", tmp_path / "encoder", "--images", "test-noise:12", "--stages", "distances",
        "--num-images", "4", "--batch-size", "8", "--out", tmp_path / "out",
    ]  # fmt: skip
    words = [str(word) for word in words]
    with tiny_encoder.stands_for_demo():
        tiny_encoder.save(tmp_path / "encoder")
        assert cli.run("evaluate", words) == 2  # not known without the plugin
        assert "'test-noise'" in capfd.readouterr().out
        assert cli.run("evaluate", [*words, "--plugin", str(plugin)]) == 0
        assert cli.run("evaluate", [*words, "--plugin", str(plugin)]) == 0  # known already
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "test-noise:12" in summary["title"] and summary["rows"]
    assert summary["identity"]["images"] == data.open_images("test-noise:12").content_hash


def test_a_corruption_from_a_file_is_a_kind_of_view(plugin):
    with pytest.raises(ValueError, match="Unknown kind of probe 'test-invertd'"):
        data.ViewConfig("test-invertd")
    registry.load_plugins(str(plugin))
    with pytest.raises(ValueError, match="did you mean 'test-inverted'"):
        data.ViewConfig("test-invertd")
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    config = data.ViewConfig("test-inverted", augment=False)
    views = data.ProbeViews(Given(image), make_encoder((8, 8)), config, random=False)
    np.testing.assert_array_equal(np.asarray(views[0].pixels), 255 - image)
    words = "--encoder demo --images demo --test-images demo --out out --kind test-inverted".split()
    assert cli.parse(cli.find("probe"), words).job.views.kind == "test-inverted"
    assert not config.is_random and data.ViewConfig("noisy", augment=False).is_random


def test_each_kind_of_corruption_can_be_pickled_for_workers(plugin):
    import pickle

    views = data.ProbeViews(
        Given(np.zeros((8, 8, 3), np.uint8)), make_encoder((8, 8)), data.ViewConfig("noisy"),
        random=True,
    )  # fmt: skip
    copy = pickle.loads(pickle.dumps(views))
    assert Image.Image.tobytes(copy[0].pixels) == Image.Image.tobytes(views[0].pixels)


@pytest.mark.parametrize("broken, message", [
    (lambda view, rng, config: view / 255, r"an array \(8, 8, 3\) of uint8, got .* of float64"),
    (lambda view, rng, config: view[:4], r"got \(4, 8, 3\) of uint8"),
    (lambda view, rng, config: None, r"got \(\) of NoneType"),
    (lambda view, rng, config: view[0, 0, 0, 0], "failed: IndexError"),
])  # fmt: skip
def test_a_corruption_that_fails_makes_no_image_unreadable(broken, message):
    """Else a mistake in it would leave out every image, one by one."""
    source = Given(np.zeros((8, 8, 3), np.uint8))
    with data.CORRUPTIONS.replaced("test-broken", data.Corruption(broken)):
        views = data.ProbeViews(
            source, make_encoder((8, 8)), data.ViewConfig("test-broken"), random=False
        )
        with pytest.raises(data.CorruptionError, match=f"'test-broken'.*{message}"):
            data.load_uint8(views, [0], input_size=(8, 8), preparation="resize")
