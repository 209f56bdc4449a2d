"""The settings side by side, on a linear encoder, and what the command refuses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ur_jax import data
from ur_jax.certify import nearest_image_classifier
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError
from ur_jax.jobs import compare_certificates, compare_smoothed
from ur_jax.jobs.compare_certificates import Config
from ur_jax.jobs.compare_smoothed import Smoothed

pytestmark = pytest.mark.usefixtures("optimised")


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


def test_smoothed_encoders_side_by_side_go_on_where_they_stopped(tmp_path, monkeypatch):
    """Kept images are not certified again, and the attack moves what it must and no more."""
    levels = np.random.default_rng(0).integers(64, 192, (2, 4, 4, 3)).astype(np.uint8)
    for i, image in enumerate(levels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((48, 6)).astype(np.float32))
    encoder = from_fn(flatten_and_multiply, weight, input_size=(4, 4))
    source = data.open_images(f"folder:{tmp_path}")
    settings = Smoothed(n0=3500, n=1000, attacked=1, out=tmp_path / "kept")
    for name, value in {"_DRAWS": 8, "_STEPS": 4, "_SAMPLES": 1000}.items():
        monkeypatch.setattr(compare_smoothed, name, value)
    run = lambda number: compare_smoothed.compare(settings, encoder, source, number, 0, 64)
    certified = []
    one = compare_smoothed.certify_image
    monkeypatch.setattr(
        compare_smoothed, "certify_image", lambda *a: certified.append(a[3]) or one(*a)
    )
    run(1)
    table = run(2)
    assert len(certified) == 2 == len(set(certified))
    cells = list(zip(*(column.cells for column in table.columns)))
    assert [row[0] for row in cells[:4]] == ["center", "geometric_median", "mean", "cosine"]
    assert float(cells[1][2]) < float(cells[0][2])  # tighter than center smoothing
    for row in cells[1:4]:
        moved, _, ratio = row[6].partition(" (")
        assert 0 < float(moved) < float(row[2]) and float(ratio.split()[0]) > 1


@pytest.mark.parametrize("flags", [{"num_images": 1}, {"divide": 0}, {"batch_size": 0}])
def test_what_is_refused(flags):
    with pytest.raises(UserError, match=next(iter(flags)).replace("_", ".")):
        Config(encoder="x", images="y", **flags)
