"""The calls of a notebook are the jobs of the command line, on images in any form."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ur_jax
from ur_jax import data
from ur_jax.errors import UserError
from ur_jax.jobs import EvaluationConfig, LabelFree, label_free_sizes, minutes
from ur_jax.jobs.minutes import Speed
from ur_jax.jobs.progress import quiet

TINY = {"num_images": 8, "eps": (0.05,), "read_at": (1, 2), "overlap_steps": 1}
TINY |= {"breakaway_steps": 1, "batch_size": 8}


def forward(weights, images):
    return jnp.tanh(images.reshape(len(images), -1) @ weights)


def make(seed):
    """An encoder of one layer."""
    weights = np.random.default_rng(seed).normal(size=(192, 5)).astype(np.float32)
    return ur_jax.from_fn(forward, weights, input_size=(8, 8))


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def found(pixels):
    """What two encoders give by one call each, lists where the job has tuples."""
    encoders, lists = [make(seed) for seed in (0, 1)], {"eps": [0.05], "read_at": [1, 2]}
    return [ur_jax.evaluate(encoder, pixels, **TINY | lists) for encoder in encoders]


def test_a_call_is_the_job(pixels, found):
    protocol = EvaluationConfig(**TINY, num_distribution=None)
    job = LabelFree(encoder=make(0), images=pixels, protocol=protocol)
    assert repr(job.run(progress=quiet).rows) == repr(found[0].rows)
    assert found[0].to_dataframe()["n"].max() == 12 and "universal" in str(found[0])


def test_minutes_fix_how_many_images_are_attacked(pixels, tmp_path, monkeypatch):
    settings = {k: v for k, v in TINY.items() if k != "num_images"} | {"eps": (0.05, 0.1)}
    # 12 clean images; 8 attacked: at 2 radii 2 attacks of 3 steps at 3, a target; 6 pairs; 1 step.
    samples = 12 + 2 * 8 * (2 * 9 + 1) + 2 * 6 * 4 + 8 * 4

    def evaluate(seconds_of_those, **changes):
        speed = Speed(0.0, seconds_of_those / samples)
        monkeypatch.setattr(label_free_sizes, "_speed", lambda *_: speed)
        given = settings | {"minutes": 1, "out": tmp_path / "run"} | changes
        return ur_jax.evaluate(make(0), pixels, **given)

    first = evaluate(49)  # of 51: a sixth of a minute is left for the rest
    assert first.identity["protocol"]["num_images"] == 8 and first.identity["minutes"] == 1
    assert {row.n for row in first.rows if row.metric == "universal_quantile"} == {8}
    assert repr(evaluate(1).rows) == repr(first.rows)  # it goes on with what it began with
    assert evaluate(1, out=None).identity["protocol"]["num_images"] == 12
    with pytest.raises(UserError, match=r"minutes >= 1\.1 on this machine, got 1: 6 images"):
        evaluate(55, out=None)
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="minutes as a positive number, got"):
            evaluate(1, minutes=wrong)
    with pytest.raises(UserError, match="minutes or num_images, got both: 1 and 8"):
        evaluate(1, num_images=8)


def test_images_in_any_form_are_the_same_images(pixels):
    torch = pytest.importorskip("torch")
    hashes = {
        data.as_source(images).content_hash
        for images in (
            pixels,
            pixels.astype(np.float32) / 255,
            list(pixels),
            torch.tensor(pixels).permute(0, 3, 1, 2).double() / 255,
        )
    }
    assert len(hashes) == 1
    pictures = [Image.fromarray(each) for each in pixels]
    rows = [{"image": picture, "label": place % 2} for place, picture in enumerate(pictures)]
    table = Rows(rows)
    assert np.array_equal(data.as_source(pictures)[3].pixels, pixels[3])
    source = data.as_source(table)
    assert source.class_names == ("cat", "dog") and source[3].label == source.label(3) == 1
    assert np.array_equal(source[3].pixels, pixels[3])


class Rows(list):
    """As a `datasets.Dataset`: rows, and what its columns are."""

    features = {"image": None, "label": types.SimpleNamespace(names=["cat", "dog"])}


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((8, 8, 3), np.uint8), r"shape \(8, 8, 3\)"),
        (np.full((2, 8, 8, 3), 255.0), "0 to 255|255 to 255"),
        (np.full((2, 8, 8, 3), np.nan), r"\[0,1\]"),
        (np.zeros((2, 8, 8, 3), np.int32), "int32"),
        ([], "spec such as"),
        (7, "spec such as"),
        ([np.zeros((8, 8, 3)), np.zeros((9, 8, 3))], "one shape"),
    ],
)
def test_what_are_no_images(images, message):
    with pytest.raises(UserError, match=message):
        data.as_source(images)


def test_compared_image_by_image(pixels, found, tmp_path):
    comparison = ur_jax.compare(*found)
    assert comparison.verdicts and "decided" in str(comparison) + "better decided"
    assert {"winner", "p_adjusted", "low"} <= set(comparison.to_dataframe().columns)
    records = json.loads(comparison.to_json())
    assert [each["p_adjusted"] for each in records] == [v.p_value for v in comparison.verdicts]
    # From a folder: the same.
    encoder = make(0)
    ur_jax.evaluate(encoder, pixels, out=tmp_path / "run", **TINY)
    again = ur_jax.compare(tmp_path / "run", found[1])
    assert [v.result for v in again.verdicts] == [v.result for v in comparison.verdicts]
    other = ur_jax.evaluate(encoder, pixels, **(TINY | {"eps": (0.1,)}))
    with pytest.raises(UserError, match="differ in nothing but the encoder, got protocol"):
        ur_jax.compare(other, found[1])
    with pytest.raises(UserError, match="finished run"):
        ur_jax.compare(tmp_path, found[1])


def test_a_notebook_shows_a_result_once(found, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)  # where printing displays
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    shown = found[0]._repr_mimebundle_()
    assert "universal_quantile" in shown["text/html"] and "\x1b" not in shown["text/plain"]


def test_results_are_drawn(found, monkeypatch):
    panels = {row.metric for row in found[0].rows}
    figure = found[0].plot()
    assert {axis.get_title().partition("\n")[0] for axis in figure.axes} - {""} == panels
    comparison = ur_jax.compare(*found)
    (axis,) = comparison.plot().axes
    for verdict, title in zip(comparison.verdicts[::-1], axis.get_yticklabels()):
        assert title.get_text().startswith(verdict.column.column.title)
    ends = [bar.get_width() for bar in axis.patches]  # of the first and the second, from below
    shares = [v.wins[name] / v.result.n for v in comparison.verdicts[::-1] for name in v.wins]
    np.testing.assert_allclose(np.abs(ends), shares)
    assert comparison.plot()._repr_png_()[1:4] == b"PNG"  # pyright: ignore
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="report"):
        found[0].plot()


def test_certify_is_a_room_and_a_call(pixels, tmp_path, monkeypatch):
    encoder = make(0)
    settings = {"num_images": 2, "n0": 300, "n": 512, "alpha1": 0.05, "alpha2": 0.05, "delta": 0.15}
    summary = ur_jax.certify(encoder, pixels, **settings)  # pyright: ignore
    assert summary.job == "certify" and summary.rows[0].n == 2
    # 12 clean images and 7 with 2 * 300 + 512 samples each take 50 of a minute's 51 seconds.
    monkeypatch.setattr(minutes, "speed", lambda *_: Speed(0.0, 50 / (12 + 7 * 1112)))
    settings = settings | {"minutes": 1, "out": tmp_path / "run"}
    with pytest.raises(UserError, match="got both: 1 and 2"):
        ur_jax.certify(encoder, pixels, **settings)  # pyright: ignore
    settings.pop("num_images")
    first = ur_jax.certify(encoder, pixels, **settings)  # pyright: ignore
    assert first.rows[0].n == first.identity["num_images"] == 7
    monkeypatch.setattr(minutes, "speed", lambda *_: Speed(0.0, 1.0))
    assert repr(ur_jax.certify(encoder, pixels, **settings).rows) == repr(first.rows)  # pyright: ignore
    with pytest.raises(UserError, match="minutes >= 131"):  # 6684 s, of .85 minutes each
        ur_jax.certify(encoder, pixels, **(settings | {"out": None}))  # pyright: ignore
    with pytest.raises(UserError, match="sigam.*sigma"):
        ur_jax.certify(encoder, pixels, sigam=0.5)  # pyright: ignore
    with pytest.raises(UserError, match="preset"):
        ur_jax.evaluate(encoder, pixels, preset="quik")


def test_importing_costs_nothing_until_something_is_used():
    code = "import sys, ur_jax; assert 'jax' not in sys.modules; ur_jax.metrics; ur_jax.u_pgd"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        ur_jax.evalute  # noqa: B018
    assert {"attacks", "evaluate", "Encoder"} <= set(dir(ur_jax))
