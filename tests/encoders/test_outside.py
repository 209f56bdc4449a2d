"""An encoder from outside the package: a published one by a plugin, one's own by its file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_encoder

from ur_jax import cli, performance
from ur_jax.encoders import loading
from ur_jax.encoders.zoo import ENCODERS
from ur_jax.performance import suite, timing

PUBLISHED = """
import dataclasses
from ur_jax.encoders.zoo import ENCODERS, register

TOY = register(dataclasses.replace(ENCODERS["resnet50"], name="toy", title="A toy from outside"))
"""

OWN = """
import jax.numpy as jnp
import numpy as np
import ur_jax

def apply(params, images):
    features = images.reshape(len(images), -1) @ params["kernel"]
    return jnp.tanh(features)

def make():
    kernel = np.random.default_rng(0).standard_normal((192, 16)).astype(np.float32) / 8
    return ur_jax.from_fn(apply, {"kernel": kernel}, input_size=(8, 8), name="own-toy")
"""


def _file(folder, name, source):
    path = folder / f"{name}.py"
    path.write_text(source)
    return path


def test_a_published_encoder_by_a_plugin(tmp_path, capsys):
    plugin = _file(tmp_path, "published_toy", PUBLISHED)
    with ENCODERS.replaced("resnet50", ENCODERS["resnet50"]):  # and forgotten afterwards
        assert cli.run("convert-weights", ["--plugin", str(plugin), "--list"]) == 0
        assert "A toy from outside" in capsys.readouterr().out
        assert loading.abstract_encoder("toy").name == "toy"
        encoder = cli.run("throughput", ["--encoders", "to", "--works", "forward"])
        assert encoder == 2 and "did you mean 'toy'" in capsys.readouterr().out
    assert "toy" not in ENCODERS


def test_an_own_encoder_from_a_file_is_evaluated(tmp_path, capsys):
    place = f"{_file(tmp_path, 'own_toy', OWN)}:make"
    tiny_encoder.save_images(tmp_path / "images", 8)
    flags = [
        *("--encoder", place, "--images", f"folder:{tmp_path / 'images'}", "--preset", "quick"),
        *("--num-images", "4", "--stages", "overlap", "--overlap-steps", "2"),
        *("--batch-size", "8", "--out", str(tmp_path / "run")),
    ]
    assert cli.run("evaluate", flags) == 0, capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["identity"]["encoder"] == "own-toy" and summary["rows"]
    assert str(tmp_path) not in json.dumps(summary["identity"])  # no place


def test_an_own_encoder_from_a_file_is_measured(tmp_path, monkeypatch):
    place = f"{_file(tmp_path, 'own_timed', OWN)}:make"
    monkeypatch.setattr(suite, "device_peaks", lambda dtypes: timing.Peaks({"float32": 1e9}, 1e9))
    sweep = performance.Sweep(
        works=("forward", "training"), encoders=(place,), batch_sizes=(8,), repeats=1
    )
    results, context = performance.run([sweep])
    assert [result.work for result in results] == ["forward"] and results[0].rate > 0
    assert "Training is measured of published networks" in context["left_out"][0]
    with pytest.raises(ValueError, match="Unknown encoder 'nowhere'"):
        performance.Sweep(encoders=("nowhere",))


def test_an_own_encoder_is_compiled_by_its_shapes(tmp_path):
    place = f"{_file(tmp_path, 'own_shapes', OWN)}:make"
    encoder = loading.abstract_encoder(place)
    assert encoder.params["kernel"].shape == (192, 16) and encoder.dimension == 16
    assert not isinstance(encoder.params["kernel"], np.ndarray)
