"""The strongest that is found, beside the paper's rows; and what the evaluation doubts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ur_jax import data, runs
from ur_jax.encoders import from_fn
from ur_jax.jobs import doubts
from ur_jax.jobs.label_free import EvaluationConfig, LabelFree
from ur_jax.jobs.label_free_tables import strongest_curves
from ur_jax.jobs.progress import quiet

SIZE = (8, 8)
WEIGHT = np.random.default_rng(0).normal(size=(192, 6)).astype(np.float32)


def bent(params, images):
    """tanh of a projection; of pixels rounded to levels, where there are any: no gradient then."""
    weight, levels, gain = params
    seen = jnp.where(levels > 0, jnp.round(images * levels) / jnp.maximum(levels, 1.0), images)
    return jnp.tanh(gain * (seen.reshape(len(images), -1) @ weight))


SMOOTH, ROUNDED, SATURATED = (0.0, 0.1), (255.0, 0.1), (0.0, 1000.0)
"""Levels and gain; of the last one tanh is flat for most images, in float32."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return data.open_images(f"folder:{folder}")


def evaluate(kind, source, out):
    protocol = EvaluationConfig(
        num_images=8, num_distribution=None, strong_steps=12, strong_restarts=2, batch_size=8
    )
    encoder = from_fn(bent, (jnp.asarray(WEIGHT), *kind), input_size=SIZE)
    job = LabelFree(encoder=encoder, images=source, stages=("strongest",), protocol=protocol)
    return job.run(out, progress=quiet, plots=False)


def names(summary):
    return {doubt["name"] for doubt in summary.details["doubts"]}


def test_the_numbers_are_those_of_the_worst_run_on_each_image(source, tmp_path):
    summary = evaluate(SMOOTH, source, tmp_path / "out")
    assert names(summary) <= {"starts differ"}, summary.details["doubts"]  # it has many maxima
    table = runs.read_table(tmp_path / "out" / "strongest.parquet")
    worst = {image: max(table["dist_l2"][table["image"] == image]) for image in set(table["image"])}
    assert len(worst) == 8 and len(table["image"]) == 8 * 10
    clean = runs.Run(tmp_path / "out").read_parts("clean")["clean"]
    pairs = np.linalg.norm(clean[:, None] - clean[None], axis=2)[np.triu_indices(len(clean), 1)]
    values = {row.metric: row for row in summary.rows}
    [curve] = strongest_curves(tmp_path / "out", float(np.median(pairs)), 12)
    row = values["strongest_normalised_distance"]
    shown = [float(x[0]) for x in (curve.x, curve.value, curve.low, curve.high)]
    np.testing.assert_allclose(shown, (12, row.value, row.low, row.high), rtol=1e-5)
    expected = np.median(list(worst.values())) / np.median(pairs)
    np.testing.assert_allclose(values["strongest_normalised_distance"].value, expected, rtol=1e-4)
    quantile = np.median([np.mean(pairs <= far) for far in worst.values()])
    np.testing.assert_allclose(values["strongest_universal_quantile"].value, quantile, atol=2e-3)
    ranks = [max(table["rank"][table["image"] == image]) for image in worst]
    risk = values["strongest_breakaway_risk"]
    np.testing.assert_allclose(risk.value, np.mean(ranks) / 23, rtol=1e-6)
    assert values["strongest_top_1_accuracy"].value == np.mean(np.array(ranks) == 0)
    assert (risk.eps, risk.step, risk.n) == (0.05, 12, 8)
    for each in LabelFree.values(tmp_path / "out", summary, {}):
        if "distance" not in each.metric:  # of which the median clean one is not here
            row = values[each.metric]
            of = np.median if "quantile" in each.metric else np.mean
            np.testing.assert_allclose(row.value, of(each.value), rtol=1e-6)
            assert (each.eps, each.step, each.divergence) == (row.eps, row.step, row.divergence)
    members = summary.details["strongest"]["0.05"]
    assert abs(sum(each["farthest_on"] for each in members.values()) - 1) < 1e-9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [ROUNDED, SATURATED])
def test_masked_gradients_are_doubted(kind, source, tmp_path, monkeypatch):
    monkeypatch.setattr(LabelFree, "doubt", lambda self: ())
    summary = evaluate(kind, source, tmp_path / "out")
    assert "zero gradients" in names(summary)
    if kind is ROUNDED:
        assert "masked gradients" in names(summary)
    lines = list(LabelFree.remarks(summary))
    assert any(line.startswith("DOUBT (zero gradients)") for line in lines)


def test_a_budget_that_is_too_small_is_doubted(source, tmp_path):
    """Of one step the distance of the last quarter is that of the start."""
    part = {
        "distances": np.ones((8, 10)), "growth": np.full((8, 10), 0.5), "flat": np.zeros((8, 10)),
        "clean": np.ones((8, 6)), "again": np.zeros(8),
    }  # fmt: skip
    config = EvaluationConfig(strong_restarts=2)
    found = {d["name"] for d in doubts._of_attacks(part, 0.05, config)}
    assert found == {"still growing"}
    part["growth"][:] = 0.0
    assert not list(doubts._of_attacks(part, 0.05, config))
    part["distances"][:, 0] = 0.5
    assert [d["name"] for d in doubts._of_attacks(part, 0.05, config)] == ["starts differ"]
    part["again"][3] = 1.0
    assert "random encoder" in {d["name"] for d in doubts._of_attacks(part, 0.05, config)}
    bank = {"clean": np.ones((50, 6), np.float32)}
    bank["clean"][:5] = 2.0
    assert [d["name"] for d in doubts._of_bank(bank)] == ["collapsed bank"]
