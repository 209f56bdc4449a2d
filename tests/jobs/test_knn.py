"""k-nearest neighbours as a job: against NumPy, by names of classes, without a folder."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ur_jax import cli
from ur_jax.encoders import from_fn
from ur_jax.encoders.base import Origin
from ur_jax.jobs.knn import Knn
from ur_jax.jobs.progress import quiet
from ur_jax.runs import Summary

SIZE = (4, 4)
SHADES = {"bright": 140, "dark": 20}


def project(weight, images):
    return images.reshape(len(images), -1) @ weight


WEIGHT = np.random.default_rng(0).standard_normal((48, 3)).astype(np.float32)
ENCODER = from_fn(project, jnp.asarray(WEIGHT), input_size=SIZE, name="mine")


def save(folder, number, seed, names=("bright", "dark")):
    """Noise of two shades that overlap."""
    rng = np.random.default_rng(seed)
    for name, low in zip(names, SHADES.values()):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = rng.integers(low, low + 110, (*SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return save(root / "train", 15, 0), save(root / "test", 9, 1)


def read(spec):
    import pathlib

    paths = sorted(pathlib.Path(spec.removeprefix("folder:")).glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(np.float64) / 255
    return pixels.reshape(len(paths), -1), np.array([path.parent.name == "dark" for path in paths])


def vote(train, labels, test, k):
    """Weighted vote in NumPy, float64."""
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit(test) @ unit(train).T
    nearest = np.argsort(-similarity, axis=1)[:, :k]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    return np.array([w[labels[n]].sum() > w[~labels[n]].sum() for w, n in zip(weights, nearest)])


def test_accuracy_equals_numpys(sets, tmp_path):
    job = Knn(encoder=ENCODER, images=sets[0], test_images=sets[1], k=5, batch_size=8)
    summary = job.run(tmp_path / "out", progress=quiet)
    (train, labels), (test, expected) = map(read, sets)
    pixels = vote(train - 0.5, labels, test - 0.5, 5) == expected
    mine = vote(train @ WEIGHT, labels, test @ WEIGHT, 5) == expected
    assert 0 < mine.sum() < len(mine)
    found = [(row.metric, row.images, row.value, row.n) for row in summary.rows]
    assert found == [
        ("knn_accuracy", "raw pixels", pixels.mean(), 18),
        ("knn_accuracy", "representations", mine.mean(), 18),
    ]
    assert repr(Summary.read(tmp_path / "out" / "summary.json").rows) == repr(summary.rows)
    assert list(Knn.remarks(summary)) == ["k = 5, 30 voting images."]
    assert repr(job.run(progress=quiet).rows) == repr(summary.rows)  # and nothing is kept


def test_a_published_network_is_recorded_with_its_files(sets):
    files = {"revision": "0123abc", "sha256": {"model.safetensors": "89ef"}}
    published = ENCODER.replace(origin=Origin("hf:group/name", {"input_size": 4, **files}))
    job = Knn(encoder=published, images=sets[0], test_images=sets[1], k=5, batch_size=8).opened()
    assert job.summary([]).provenance["encoder"] == {"place": "hf:group/name", **files}
    assert "encoder" not in dataclasses.replace(job, encoder=ENCODER).summary([]).provenance


def test_classes_are_compared_by_name(sets, tmp_path):
    """The test images' labels 0 and 1 are the voting ones' 1 and 0."""
    job = Knn(encoder=ENCODER, images=sets[0], test_images=sets[1], k=5, batch_size=8)
    swapped = save(tmp_path / "swapped", 9, 1, ("z", "a"))  # z is bright, and label 1
    changed = dataclasses.replace(job, test_images=swapped)
    with pytest.raises(ValueError, match="Unknown class of the voting images 'a'"):
        changed.run()
    changed = dataclasses.replace(changed, class_map=("z=bright", "a=dark"))
    assert [r.value for r in changed.run(progress=quiet).rows] == [
        r.value for r in job.run(progress=quiet).rows
    ]
    same = dataclasses.replace(job, test_images=sets[0])
    said = list(Knn.remarks(same.run(progress=quiet)))[-1]
    assert said.startswith("30 of 30 test images are among the voting images, pixel for pixel")


def test_bad_settings_are_said_before_anything_is_read(sets, tmp_path):
    job = Knn(encoder=ENCODER, images=sets[0], test_images=sets[1], k=5, batch_size=8)
    for change, message in (
        ({"k": 0}, "k >= 1, got 0"),
        ({"k": 31}, "k <= 30, the voting images, got 31"),
        ({"num_images": 0}, "num_images >= 1, or none, got 0"),
        ({"num_test_images": 19}, "19 samples of a listing of 18"),
        ({"batch_size": 9}, "divisible by 8"),
        ({"images": "demo", "k": 1}, "Unknown class of the voting images 'bright'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(job, **change).run(tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_collapsed_encoder_and_one_that_is_not_finite(sets, monkeypatch):
    monkeypatch.setattr(Knn, "doubt", lambda self: ())  # which finds both at once
    job = Knn(encoder=ENCODER, images=sets[0], test_images=sets[1], k=5, batch_size=8)
    for weight, message in ((0.0, "encoder 'mine' are collapsed"), (1e38, "18 rows with NaN")):
        broken = ENCODER.replace(params=ENCODER.params * weight)
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(job, encoder=broken).run(progress=quiet)


def test_the_command_needs_no_folder(sets, capsys, monkeypatch):
    monkeypatch.setattr(cli, "keep_compilations", lambda: None)
    words = ["--encoder", "demo", "--images", sets[0], "--test-images", sets[1], "--k", "3"]
    command = cli.find("knn")
    flags = cli.parse(command, [*words, "--batch-size", "8"])
    assert flags.out is None and flags.job.representation == "features"
    command.main(flags)
    printed = capsys.readouterr().out
    assert "knn_accuracy" in printed and "30 voting images" in printed
    assert "Results in" not in printed
