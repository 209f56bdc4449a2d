"""Impersonation on a linear encoder, where it is known which images can pass for the others."""

from __future__ import annotations

import dataclasses
import json

import impersonate
import interrupted
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ur_jax
from ur_jax.attacks import AttackConfig, u_pgd
from ur_jax.encoders import from_fn
from ur_jax.jobs import impersonate as impersonation
from ur_jax.jobs import probe as probing
from ur_jax.jobs.impersonate import ImpersonationConfig, make_group

SIZE = (4, 4)
ULP = 2.0**-23


def mean_brightness(params, images):
    """f(x) = mean of x: a perturbation of linf norm eps moves it by eps, and by no more."""
    return images.mean((1, 2, 3))[:, None] * params


@pytest.fixture(scope="module")
def encoder():
    return from_fn(mean_brightness, jnp.ones(1), input_size=SIZE, name="brightness")


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
def config(encoder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(ur_jax, "load_encoder", lambda *args, **kwargs: encoder)
    trained = {
        "kernel": np.array([[1.0, -1.0]], np.float32), "bias": np.array([-0.5, 0.5], np.float32)
    }  # fmt: skip
    metadata = {"class_names": ["dog", "cat"]}
    probing.save_probe(tmp_path / "probe", trained, encoder, metadata)
    # Twice eps in ten steps: from anywhere in the ball to its end.
    attack = ImpersonationConfig(eps=0.1, step_size=0.02, read_at=(1, 4, 12), batch_size=8)
    return impersonate.Config(
        encoder="brightness", probe=str(tmp_path / "probe"), images=photos,
        out=tmp_path / "out", attack=attack,
    )  # fmt: skip


def rows_of(out):
    return pq.read_table(out / "impersonations.parquet").to_pylist()


def test_success_where_eps_suffices(config, tmp_path):
    """Exactly the correct images within eps of 1/2 pass at the end, whatever their target."""
    impersonate.main(config)
    rows = rows_of(config.out)
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

    summary = json.loads((config.out / "summary.json").read_text())
    found = {(m["images"], m["step"]): m for m in summary["metrics"]}
    assert len(found) == 9
    assert (found["both", 12]["value"], found["both", 12]["n"]) == (5 / 8, 8)
    assert found["cat -> dog", 12]["n"] == 4
    assert summary["clean_accuracy"]["cat"]["value"] == 4 / 5
    assert Image.open(config.out / "impersonations.png").size[0] > 300


def test_killed_and_resumed_and_bad_settings(config, tmp_path, monkeypatch):
    impersonate.main(config)
    killed = dataclasses.replace(config, out=tmp_path / "killed")
    for count in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(impersonate.command, "progress", interrupted.stop_after(count))
            with pytest.raises(KeyboardInterrupt):
                impersonate.main(killed)
    impersonate.main(killed)
    for name in ("summary.json", "impersonations.parquet"):
        assert (config.out / name).read_bytes() == (killed.out / name).read_bytes()

    fewer = dataclasses.replace(config.attack, num_images=2)
    changed = dataclasses.replace(config, attack=fewer, out=tmp_path / "fewer")
    impersonate.main(changed)
    assert len(rows_of(changed.out)) == 2 * 2 * 3
    for change, message in (
        ({"first": ("cats",)}, "Unknown class of the images 'cats'; did you mean 'Cat'"),
        ({"first": ("fish",)}, "Unknown class of the probe 'fish'"),
        ({"first": ("dog",)}, "without a common class"),
        ({"first_range": (1, 2)}, "0 to 1 for cat, got 1 and 2"),
        ({"attack": dataclasses.replace(fewer, batch_size=3)}, "divisible by 8"),
        ({"first_range": (2, 1)}, "got 2 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            impersonate.main(dataclasses.replace(config, out=tmp_path / "bad", **change))
    assert not (tmp_path / "bad").exists()


def test_the_moving_ball_exceeds_eps_and_ours_is_one_u_pgd(encoder):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(0.4, 0.6, (2, *SIZE, 3)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), 2)
    target = jnp.array([[0.9], [0.1]])
    settings = ImpersonationConfig(eps=0.1, step_size=0.03, read_at=(2, 3, 10))
    reads = list(impersonation.attack(encoder, images, keys, target, config=settings))
    whole = u_pgd(
        encoder, images, keys, target=target,
        config=AttackConfig(eps=0.1, step_size=0.03, num_steps=10),
    )  # fmt: skip
    np.testing.assert_allclose(reads[-1], whole.images, atol=ULP)
    # Distances before a step of the one run are those of the readings.
    for step, attacked in zip(settings.read_at[:2], reads):
        left = np.abs(encoder(attacked) - target)[:, 0]
        np.testing.assert_allclose(left, whole.history.dist_l2[:, step], atol=1e-6)
        assert np.abs(attacked - images).max() <= 0.1 + ULP
    moving = dataclasses.replace(settings, moving_ball=True)
    reads = list(impersonation.attack(encoder, images, keys, target, config=moving))
    assert np.abs(reads[0] - images).max() <= 0.1 + ULP
    assert np.abs(reads[2] - images).max() > 0.11
    for before, after in zip(reads, reads[1:]):
        assert np.abs(after - before).max() <= 0.1 + ULP


def test_imagenets_groups_are_ranges_of_the_probe():
    preset = impersonate.PRESETS["imagenet"]
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
    for read_at in ((), (0, 1), (3, 3)):
        with pytest.raises(ValueError, match="increasing read_at"):
            ImpersonationConfig(read_at=read_at)
