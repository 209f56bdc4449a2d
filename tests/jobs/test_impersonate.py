"""Impersonation on a linear encoder, where it is known which images can pass for the others."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ur_jax
from ur_jax.encoders import from_fn
from ur_jax.jobs import impersonate as impersonation
from ur_jax.jobs.impersonate import Impersonate, ImpersonationConfig, make_group
from ur_jax.jobs.progress import quiet
from ur_jax.probes.checkpoint import load_probe, save_probe

SIZE = (4, 4)
ULP = 2.0**-23


def mean_brightness(params, images):
    """f(x) = mean of x: a perturbation of linf norm eps moves it by eps, and by no more."""
    return images.mean((1, 2, 3))[:, None] * params


ENCODER = from_fn(mean_brightness, jnp.ones(1), input_size=SIZE, name="brightness")

# Brightness of each image. The probe calls an image a dog above 1/2.
LEVELS = {"Cat": [70, 100, 112, 120, 180], "Dog": [60, 140, 145, 150, 200], "fish": [10, 240]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, levels in LEVELS.items():
        (folder / name).mkdir()
        for i, level in enumerate(levels):
            Image.new("RGB", SIZE, (level,) * 3).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


@pytest.fixture
def job(photos, tmp_path):
    trained = {
        "kernel": np.array([[1.0, -1.0]], np.float32), "bias": np.array([-0.5, 0.5], np.float32)
    }  # fmt: skip
    save_probe(tmp_path / "probe", trained, ENCODER, {"class_names": ["dog", "cat"]})
    # Twice eps in ten steps: from anywhere in the ball to its end.
    attack = ImpersonationConfig(eps=0.1, step_size=0.02, read_at=(1, 4, 12), batch_size=8)
    return Impersonate(encoder=ENCODER, probe=str(tmp_path / "probe"), images=photos, attack=attack)


def rows_of(out):
    return pq.read_table(out / "impersonations.parquet").to_pylist()


def test_success_where_eps_suffices(job, tmp_path):
    """Exactly the correct images within eps of 1/2 pass at the end, whatever their target."""
    summary = job.run(tmp_path / "out", progress=quiet)
    rows = rows_of(tmp_path / "out")
    ends = {row["name"]: row for row in rows if row["step"] == 12}
    correct = {"Cat": [70, 100, 112, 120], "Dog": [140, 145, 150, 200]}
    expected = {}
    for group, levels in correct.items():
        for level in levels:
            name = f"{group}/{LEVELS[group].index(level)}.png"
            expected[name] = abs(level / 255 - 0.5) < 0.1
    assert {name: row["success"] for name, row in ends.items()} == expected
    assert sum(expected.values()) == 5
    for row in rows:
        group = row["name"].split("/")[0]
        assert row["direction"] == ("cat -> dog" if group == "Cat" else "dog -> cat")
        assert (row["predicted"] == 0) == (row["success"] == (group == "Cat"))
        assert row["perturb_linf"] <= 0.1 + ULP
    # What is left of the distance to the target: both are linear in brightness.
    names = [f"{group}/{i}.png" for group in LEVELS for i in range(len(LEVELS[group]))]
    levels = [level / 255 for group in LEVELS.values() for level in group]
    for name, row in ends.items():
        own, target = levels[names.index(name)], levels[row["target"]]
        assert names[row["target"]] in expected  # also correctly classified
        left = max(abs(target - own) - 0.1, 0.0)
        assert left - 1e-5 <= row["distance"] <= left + 0.02 + 1e-5  # it may step over the target

    found = {(row.images, row.step): row for row in summary.rows}
    assert len(found) == 9
    assert {(row.metric, row.eps) for row in summary.rows} == {("impersonation_success", 0.1)}
    assert (found["both", 12].value, found["both", 12].n) == (5 / 8, 8)
    assert found["cat -> dog", 12].n == 4
    assert summary.details["clean_accuracy"]["cat"]["value"] == 4 / 5
    assert Image.open(tmp_path / "out" / "impersonations.png").size[0] > 300
    first, second = Impersonate.remarks(summary)
    assert first.startswith("cat: the probe classifies 80.0% of 5 clean images correctly")

    # A probe in memory is the same job; other weights are another.
    live = dataclasses.replace(job, probe=load_probe(job.probe, ENCODER))
    assert live.run(progress=quiet).identity == summary.identity
    assert "probe" in summary.identity["requires"]
    changed = dataclasses.replace(live, probe=live.probe.replace(bias=live.probe.bias + 1))
    with pytest.raises(ValueError, match="requires.probe"):
        changed.run(tmp_path / "out", progress=quiet)


def test_planned_before_the_probe_is_there_and_refused_until_then(job, tmp_path):
    early = dataclasses.replace(job, probe=str(tmp_path / "later")).opened()
    assert early.request == job.opened().request
    with pytest.raises(ValueError, match="no probe at .*later"):
        early.run(tmp_path / "out", progress=quiet)
    with pytest.raises(ValueError, match="Expected a probe"):
        Impersonate(encoder=ENCODER, images=job.images).run()
    assert not (tmp_path / "out").exists()


def test_the_probe_reads_another_output_of_the_network(tmp_path):
    """Attacked is the head's output; the probe sees the backbone's."""
    demo = ur_jax.load_encoder("demo", representation="backbone")
    trained = {"kernel": np.zeros((demo.dimension, 2), np.float32), "bias": np.zeros(2, np.float32)}
    save_probe(tmp_path / "probe", trained, demo, {"class_names": ["a", "b"]})
    job = Impersonate(
        encoder="demo", images="demo", probe=str(tmp_path / "probe"), representation="projection"
    ).opened()
    assert job.model.representation == "projection" and job.model.dimension == 128
    assert job.classifier.encoder.dimension == demo.dimension
    wrong = dataclasses.replace(
        job, probe=str(tmp_path / "probe"), probe_representation="projection"
    )
    with pytest.raises(ValueError, match="reads the representation 'backbone'"):
        wrong.opened()


def test_bad_settings(job, tmp_path):
    fewer = dataclasses.replace(job.attack, num_images=2)
    dataclasses.replace(job, attack=fewer).run(tmp_path / "fewer", progress=quiet)
    assert len(rows_of(tmp_path / "fewer")) == 2 * 2 * 3
    for change, message in (
        ({"first": ("cats",)}, "Unknown class of the images 'cats'; did you mean 'Cat'"),
        ({"first": ("fish",)}, "Unknown class of the probe 'fish'"),
        ({"first": ("fish",), "class_map": ("fish=cat",), "second": ("cat",)}, "common class"),
        ({"class_map": ("fsh=cat",)}, "in the class map 'fsh'; did you mean 'fish'"),
        ({"class_map": ("fish=ca",)}, "Unknown class of the probe 'ca'"),
        ({"first": ("dog",)}, "without a common class"),
        ({"first_range": (1, 2)}, "0 to 1 for cat, got 1 and 2"),
        ({"attack": dataclasses.replace(fewer, batch_size=3)}, "divisible by 8"),
        ({"first_range": (2, 1)}, "got 2 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(job, **change).run(tmp_path / "bad", progress=quiet)
    assert not (tmp_path / "bad").exists()


def test_classes_that_the_probe_calls_otherwise(job, tmp_path):
    """Fish count as cats: the darker one is classified right, the brighter one is not."""
    job = dataclasses.replace(job, first=("fish",), class_map=("fish=cat",))
    summary = job.run(progress=quiet)
    assert summary.details["clean_accuracy"]["fish"]["value"] == 1 / 2


def test_imagenets_groups_are_ranges_of_the_probe():
    preset = Impersonate.presets["imagenet"]
    folders = ("Cat", "Dog")
    cat = make_group(preset.first, folders, (), preset.first_range)
    dog = make_group(preset.second, folders, (), preset.second_range)
    assert (cat.labels, dog.labels) == ((0,), (1,))
    assert (cat.classes[0], cat.classes[-1], len(cat.classes)) == (281, 293, 13)
    assert (dog.classes[0], dog.classes[-1], len(dog.classes)) == (151, 274, 124)
    impersonation.check_groups((cat, dog), 1000)
    with pytest.raises(ValueError, match="0 to 99, got 293"):
        impersonation.check_groups((cat, dog), 100)
    with pytest.raises(ValueError, match="at least one class name"):
        make_group((), folders, folders)
