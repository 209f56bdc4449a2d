"""The settings side by side, on a linear encoder, and what the command refuses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax.certify import nearest_image_classifier
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError
from ur_jax.jobs import compare_certificates
from ur_jax.jobs.compare_certificates import Config


def flatten_and_multiply(params, images):
    return images.reshape(images.shape[0], -1) @ params


def test_each_setting_is_measured_and_the_adaptive_ones_draw_less():
    rng = np.random.default_rng(0)
    images = rng.random((2, 4, 4, 3)).astype(np.float32)
    weight = jnp.asarray(rng.standard_normal((48, 6)).astype(np.float32))
    encoder = from_fn(flatten_and_multiply, weight, input_size=(4, 4))
    nearest = nearest_image_classifier(encoder, encoder(jnp.asarray(images)))
    found = {
        name: compare_certificates.compare(name, setting, encoder, nearest, images, 0, 64)
        for name, setting in compare_certificates.settings(50)
        if "radii" not in name
    }
    assert {each.num_images for each in found.values()} == {2}
    samples = {name: each.samples for name, each in found.items()}
    assert samples["center, published (Hoeffding)"] == samples["center, exact"] == 1200 * 2 + 2000
    assert samples["center, adaptive to 5 %"] < samples["center, exact"]
    assert samples["randomized, published = exact"] == 2100
    assert samples["randomized, adaptive to sigma/10"] < 2100
    assert all(size > 0 for each in found.values() for size in each.sizes)


@pytest.mark.parametrize("flags", [{"num_images": 1}, {"divide": 0}, {"batch_size": 0}])
def test_what_is_refused(flags):
    with pytest.raises(UserError, match=next(iter(flags)).replace("_", ".")):
        Config(encoder="x", images="y", **flags)
