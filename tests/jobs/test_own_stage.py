"""A stage of the benchmark from a file outside the package."""

from __future__ import annotations

import csv
import os
import sys

import jax
import pytest
import tiny_encoder

from ur_jax import cli
from ur_jax.jobs.matrix import STAGES

PLUGIN = """
import dataclasses

from ur_jax.jobs import LabelFree
from ur_jax.jobs.matrix import STAGES, Planned


@STAGES.register("test-small-steps")
def small_steps(cell):
    protocol = dataclasses.replace(cell.config.protocol, step_size=0.0001)
    job = LabelFree(
        **cell.shared, images=cell.source("images"), stages=("overlap",), protocol=protocol
    )
    yield Planned("overlap-small-steps", job)
"""


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "stages_for_a_test.py"
    path.write_text(PLUGIN)
    yield path
    sys.modules.pop(path.stem, None)
    STAGES._items.pop("test-small-steps", None)


@pytest.mark.filterwarnings("ignore")
def test_a_stage_from_a_file_is_planned_run_and_reported(plugin, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", jax.device_count)  # as many devices as there are already
    tiny_encoder.save_images(tmp_path / "images", 12)
    words = [
        "--plugin", plugin, "--encoders", f"tiny={tmp_path / 'encoder'}", "--images",
        f"folder:{tmp_path / 'images'}", "--workdir", tmp_path / "work", "--only", "*/overlap*",
        "--protocol.num-images", 6, "--protocol.batch-size", 8, "--protocol.overlap-steps", 2,
    ]  # fmt: skip
    with tiny_encoder.stands_for_demo():
        tiny_encoder.save(tmp_path / "encoder")
        assert cli.run("benchmark", [*map(str, words), "--dry-run"]) == 0
        assert "tiny/overlap-small-steps" in capfd.readouterr().out
        assert not (tmp_path / "work").exists()
        assert cli.run("benchmark", list(map(str, words))) == 0
    with open(tmp_path / "work" / "RESULTS.csv") as file:
        margins = {
            row["stage"]: float(row["value"])
            for row in csv.DictReader(file)
            if (row["metric"], row["divergence"]) == ("adversarial_margin", "l2")
        }
    assert set(margins) == {"overlap", "overlap-small-steps"}
    assert margins["overlap-small-steps"] > margins["overlap"]  # it is moved less
    assert "overlap-small-steps" in (tmp_path / "work" / "report.html").read_text()
