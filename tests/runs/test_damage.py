"""A sample of `fuzz_files`, which is run by itself for hundreds: flipped bits and cut files."""

from __future__ import annotations

import random

import fuzz_files
import pytest
import tiny_encoder

from ur_jax.jobs import Job

SCENES = ("knn", "certify", "probe, in its training")
GOOD = ("the same", "made again", "not affected", "named", "named, repaired")


@pytest.mark.filterwarnings("ignore")
def test_damage_brings_no_wrong_number_and_loses_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "doubt", lambda self: ())
    with tiny_encoder.stands_for_demo():
        found, rng = fuzz_files.scenes(tmp_path, SCENES), random.Random(0)
        for scene, path in fuzz_files.cases(found, 20):
            ended = fuzz_files.outcome(scene, tmp_path, path, rng)
            assert ended in GOOD, ended
