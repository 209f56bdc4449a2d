"""Ways to fine-tune, side by side: trained, measured, kept, and told in one table."""

from __future__ import annotations

import types

import jax.numpy as jnp
import pytest
import tiny_encoder

from ur_jax import cli, runs
from ur_jax.attacks import AttackConfig, StrongConfig
from ur_jax.encoders import loading
from ur_jax.errors import UserError
from ur_jax.jobs import compare_training


def _moved(encoder, images, key, *, config):
    """In the place of the strongest attack, which has tests of its own and is long to compile."""
    clean = encoder(images)
    each = clean[:, None] + 0.1 * config.budget
    return types.SimpleNamespace(
        each=each, clean=clean, distance=jnp.linalg.norm(each[:, 0] - clean, axis=1)
    )


def test_the_table_of_a_tiny_encoder_and_nothing_is_done_twice(tmp_path, monkeypatch, capsys):
    tiny_encoder.save_images(tmp_path / "images", 24)
    tiny_encoder.save(tmp_path / "pretrained" / "demo")
    monkeypatch.setattr(loading, "_PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setattr(compare_training, "strong", _moved)
    images = f"folder:{tmp_path / 'images'}"
    config = compare_training.Config(
        images, images, tmp_path / "out", ("lore@0.05",), 16, 1, 8,
        AttackConfig(0.05, 0.02, 1), 16, 16, 4, StrongConfig(0.05, 1, 1),
    )  # fmt: skip
    with tiny_encoder.stands_for_demo():
        assert compare_training.main(config) == 0
        first = (tmp_path / "out" / "methods.md").read_text()
        monkeypatch.setattr(compare_training, "_measures", None)  # they are all there
        assert compare_training.main(config) == 0
    header, _, demo, lore = first.splitlines()
    assert first == (tmp_path / "out" / "methods.md").read_text()
    assert header.split("|")[1:3] == [" encoder ", " probe kept, clean "]
    assert demo.startswith("| demo | ") and demo.endswith("| 0.000 (0.000-0.000) |")
    assert lore.startswith("| lore@0.05 | ")
    known = runs.read_json(tmp_path / "out" / "measured" / "demo.json")
    kept, anew = (known["measures"][name] for name in ("kept", "anew"))
    assert kept == anew and kept[3] == 16


def test_an_unknown_way_is_refused_before_anything_is_trained(tmp_path):
    command = cli.find("compare-training")
    words = ["--images", "demo", "--test-images", "demo", "--workdir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="'lora'; did you mean 'lore'"):
        cli.parse(command, [*words, "--methods", "lora"])
