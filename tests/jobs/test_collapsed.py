"""An encoder that gives all images the same representation is refused by every job, by name."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest
import tiny_encoder

from ur_jax.certify import RandomizedConfig
from ur_jax.encoders import from_fn
from ur_jax.jobs.certify import Certify
from ur_jax.jobs.knn import Knn
from ur_jax.jobs.label_free import EvaluationConfig, LabelFree
from ur_jax.jobs.probe import Probe
from ur_jax.jobs.progress import quiet
from ur_jax.probes.linear import ProbeConfig


def constant(weights, images):
    return jnp.zeros((len(images), 4)) * images.mean() + weights


ENCODER = from_fn(constant, jnp.ones(4), input_size=tiny_encoder.SIZE, name="constant")
JOBS = {
    "evaluate": lambda test: LabelFree(
        stages=("distances", "attacks"), protocol=EvaluationConfig(num_images=8, batch_size=8)
    ),
    "certify": lambda test: Certify(
        method="randomized", config=RandomizedConfig(), probe="nearest", num_images=4
    ),
    "probe": lambda test: Probe(
        test_images=test, cached=True, training=ProbeConfig(num_epochs=1, batch_size=8)
    ),
    "knn": lambda test: Knn(test_images=test, k=3, batch_size=8),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_collapsed_encoder_is_refused(name, tmp_path):
    tiny_encoder.save_images(tmp_path / "images", 16)
    images = f"folder:{tmp_path / 'images'}"
    job = dataclasses.replace(JOBS[name](images), encoder=ENCODER, images=images)
    with pytest.raises(ValueError, match="encoder 'constant' are collapsed"):
        job.run(tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out" / "summary.json").exists()
