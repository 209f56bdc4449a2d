"""Every script's `main` on tiny data, killed and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json

import command
import evaluate
import interrupted
import jax
import knn
import numpy as np
import pytest
import tiny_encoder
import train
from PIL import Image

from ur_jax.encoders import checkpoints
from ur_jax.jobs.label_free import EvaluationConfig

SIZE = (8, 8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of twelve images: dark and bright noise."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, low in (("bright", 130), ("dark", 0)):
        (folder / label).mkdir()
        for i in range(12):
            pixels = rng.integers(low, low + 120, (*SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02d}.png")
    return f"folder:{folder}"


@pytest.fixture
def tiny():
    """Encoder "demo" with a network of a few hundred weights."""
    with tiny_encoder.stands_for_demo():
        yield


def _stop_at_row(row):
    """A counter that ends the process, as it were, when the metrics of a row are due."""
    left = itertools.count(row - 1, -1)

    @contextlib.contextmanager
    def counter(*_):
        def update(*_):
            if next(left) == 0:
                raise KeyboardInterrupt

        yield update

    return counter


def test_train_then_knn_then_evaluate(tiny, images, tmp_path, monkeypatch, capsys):
    config = train.Config(
        images=images, out=tmp_path / "whole", batch_size=8, num_epochs=3, group_size=4,
        queue_size=16, view_size=8,
    )  # fmt: skip
    train.main(config)
    # Killed in the second epoch, resumed: the same weights, bit for bit.
    killed = dataclasses.replace(config, out=tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(train.command, "counter", _stop_at_row(2))
        with pytest.raises(KeyboardInterrupt):
            train.main(killed)
    train.main(killed)
    whole, killed = (
        checkpoints.restore_encoder(tmp_path / name / "encoder") for name in ("whole", "killed")
    )
    jax.tree.map(np.testing.assert_array_equal, whole[0], killed[0])
    assert len((tmp_path / "killed" / "metrics.csv").read_text().splitlines()) == 1 + 3
    with pytest.raises(ValueError, match="another configuration.*learning_rate"):
        train.main(dataclasses.replace(config, learning_rate=0.1))

    encoder = str(tmp_path / "whole" / "encoder")
    knn.main(knn.Config(encoder, images, images, k=3, batch_size=16, out=tmp_path / "knn.json"))
    accuracy = json.loads((tmp_path / "knn.json").read_text())["accuracy"]
    assert accuracy["raw pixels"]["value"] == 1.0 and accuracy["demo"]["n"] == 24

    protocol = EvaluationConfig(
        num_images=10, eps=(0.05,), read_at=(1, 2), overlap_steps=1, breakaway_steps=1,
        num_distribution=None, batch_size=8,
    )  # fmt: skip
    out = tmp_path / "evaluated"
    config = evaluate.Config(encoder=encoder, images=images, out=out, protocol=protocol)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.command, "progress", interrupted.stop_after(5))
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(config)
    assert not (out / "summary.json").exists()
    evaluate.main(config)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == 2 and len(summary["config"]["weights_sha256"]) == 64
    assert {m["metric"] for m in summary["metrics"]} >= {"universal_quantile", "overlap_risk"}
    for name in ("distances.png", "margins.png", "gallery.png"):
        assert Image.open(out / name).size[0] > 300
    evaluate.main(dataclasses.replace(config, out=tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "summary.json").read_text()) == summary
    assert "overlap_risk" in capsys.readouterr().out


def test_the_batch_size_is_found_and_kept_for_a_run_that_goes_on(
    tiny, images, tmp_path, monkeypatch
):
    tiny_encoder.save(tmp_path / "encoder")
    protocol = EvaluationConfig(
        num_images=20, eps=(0.05,), overlap_steps=1, num_distribution=None, batch_size=None
    )
    config = evaluate.Config(
        encoder=str(tmp_path / "encoder"), images=images, out=tmp_path / "out",
        stages=("distances",), protocol=protocol,
    )  # fmt: skip
    evaluate.main(config)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["protocol"]["batch_size"]
    assert found == 24  # 20 images are 3 for each of 8 devices
    monkeypatch.setattr(evaluate.evaluation.memory, "fit_batch_size", lambda *_: 1)
    evaluate.main(config)
    evaluate.main(dataclasses.replace(config, out=tmp_path / "other"))
    other = json.loads((tmp_path / "other" / "config.json").read_text())["protocol"]
    assert other["batch_size"] == 8


def test_presets_give_defaults_that_flags_change():
    args = [
        "--preset",
        "quick",
        "--encoder",
        "demo",
        "--images",
        "demo",
        "--out",
        "x",
        "--eps",
        "0.2",
    ]
    config = command.parse(evaluate.Config, evaluate.PRESETS, args)
    assert config.protocol == dataclasses.replace(evaluate.PRESETS["quick"].protocol, eps=(0.2,))
    with pytest.raises(ValueError, match="Unknown preset 'quik'.*'quick'"):
        command.parse(evaluate.Config, evaluate.PRESETS, ["--preset", "quik"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder": "demmo"}, "demo"),
        ({"encoder": "resnet50"}, "resnet50-0676ba61.pth"),
        ({"images": "folder:/nowhere/at/all"}, "/nowhere/at/all"),
        ({"images": "demos"}, "demo"),
        ({"representation": "paperr"}, "'paper'"),
    ],
)
def test_bad_flags_end_in_one_line(change, message, tmp_path, monkeypatch, capsys):
    flags = {"encoder": "demo", "images": "demo", "out": str(tmp_path / "out")} | change
    args = [word for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *args])
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        command.run(evaluate.main, evaluate.Config, evaluate.PRESETS)
    assert ended.value.code == 2
    printed = capsys.readouterr().out
    assert (
        "error:" in printed and message in printed.replace("\n", " ") and "Traceback" not in printed
    )


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        command.keep_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ur_jax")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        command.keep_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
