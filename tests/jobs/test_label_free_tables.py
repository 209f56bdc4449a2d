"""From parts to numbers: what has no value is left out by name."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from PIL import Image

from ur_jax import data, devices, runs
from ur_jax.encoders import from_fn
from ur_jax.jobs import label_free_tables as tables
from ur_jax.jobs.label_free import EvaluationConfig, LabelFree
from ur_jax.jobs.progress import quiet


def test_pairs_without_a_margin_are_counted_and_said(tmp_path):
    run = runs.open_run(tmp_path / "run", {})
    margins = np.array([0.5, -0.5, np.nan, 0.25, np.nan], np.float32)
    part = {"index": np.arange(5), "second": np.arange(5, 10), "unreadable": np.empty((0, 2), "U1")}
    for d in tables.DIVERGENCES:
        part[f"margin_{d}"] = margins if d == "l2" else np.abs(np.nan_to_num(margins))
        part[f"clean_dist_{d}"] = np.where(np.isnan(margins), 0, 1).astype(np.float32)
    run.write_part("overlap", 0, part)
    rows = {
        (row.metric, row.divergence): row for row in tables.overlap_rows(run, EvaluationConfig())
    }
    risk, margin = rows["overlap_risk", "l2"], rows["adversarial_margin", "l2"]
    assert (risk.value, risk.n, risk.n_excluded) == (1 / 3, 3, 2)
    assert (margin.value, margin.n, margin.n_excluded) == (0.25, 3, 2)
    assert "two copies" in risk.excluded
    whole = rows["overlap_risk", "l1"]
    assert (whole.n, whole.n_excluded, whole.excluded) == (5, 0, "")


def test_the_gallery_has_who_is_near_before_and_after_the_attack(tmp_path):
    run, rng = runs.open_run(tmp_path / "run", {}), np.random.default_rng(0)
    clean, index = rng.normal(size=(20, 4)).astype(np.float32), np.arange(20) * 3
    rows = [2, 7, 11]
    attacked = clean[rows] + rng.normal(size=(3, 4)).astype(np.float32)
    unreadable = np.empty((0, 2), "U1")
    part = {"index": index[rows], "clean": clean[rows], "attacked": attacked}
    run.write_part("breakaway", 0, part | {"unreadable": unreadable})
    images = rng.random((2, 3, 3, 3), np.float32)
    shown = {"index": index[rows[1:]], "images": images, "attacked_images": images}
    run.write_part("gallery", 0, shown)
    found = tables.gallery(run, {"clean": clean, "index": index}, devices.data_mesh())
    for name, queries in (("before", clean[rows[1:]]), ("after", attacked[1:])):
        distances = np.linalg.norm(queries[:, None] - clean[None], axis=2)
        np.testing.assert_array_equal(found[name], index[np.argsort(distances)[:, :5]])
    assert found["before"][:, 0].tolist() == found["index"].tolist()  # the images themselves


def _between_levels(weight, images):
    """W x, but NaN of a picture with a pixel between two of the 256 levels, as attacked ones are.

    The rounding hides the gradient of the first pixels.
    """
    levels = images * 255.0
    is_level = jnp.all(jnp.abs(levels - jnp.round(levels)) < 1e-3, axis=(1, 2, 3))
    flat = images.reshape(len(images), -1).at[:, :3].set(jnp.round(levels[:, 0, 0]))
    return jnp.where(is_level[:, None], flat @ weight, jnp.nan)


def test_images_attacked_into_nan_are_the_worst_and_counted(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(12):
        pixels = rng.integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
    weight = jnp.asarray(rng.standard_normal((90, 6)), jnp.float32)
    job = LabelFree(
        encoder=from_fn(_between_levels, weight, input_size=(6, 5)),
        images=data.open_images(f"folder:{tmp_path / 'images'}"),
        protocol=EvaluationConfig(
            num_images=6, eps=(0.05,), step_size=0.01, read_at=(1,),
            overlap_steps=1, breakaway_steps=1, batch_size=8,
        ),
    )  # fmt: skip
    summary = job.run(tmp_path / "run", progress=quiet, plots=False)
    worst = {
        "normalised_distance": np.inf, "universal_quantile": 1.0, "cosine_similarity": -1.0,
        "universal_quantile_targeted": 0.0, "relative_quantile": 0.0, "overlap_risk": 1.0,
        "adversarial_margin": -np.inf, "breakaway_risk": 1.0, "top_1_accuracy": 0.0,
        "top_5_accuracy": 0.0,
    }  # fmt: skip
    seen = set()
    for row in summary.rows:
        if row.metric in worst:
            seen.add(row.metric)
            assert (row.value, row.n, row.n_excluded) == (worst[row.metric], 6, 0), row
    assert seen == set(worst)
    assert {s: c["lost"] for s, c in summary.details["attack_health"].items()} == dict.fromkeys(
        ("untargeted_0.05", "targeted_0.05", "overlap", "breakaway"), 6
    )
    assert sum("count as the worst" in remark for remark in job.remarks(summary)) == 4
    curves = list(job.curves(tmp_path / "run", summary, {}))
    assert {float(c.value[-1]) for c in curves if c.kind == "line"} == {np.inf, 0.0}
