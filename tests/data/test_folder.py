"""Folders: what is listed, in which order, by which names and labels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from given_images import LISTING, UNREADABLE, flat, write_images

from ur_jax import data, runs
from ur_jax.data import reading


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    return tmp_path


def test_folder_listing_labels_and_modes(folder):
    source = data.open_images(f"folder:{folder}")
    assert [source.name(i) for i in range(len(source))] == LISTING
    assert source.class_names == ("a", "a-x", "b")
    values = {"root.png": 10, "a/1.PNG": 20, "a/grey.png": 30, "a-x/cmyk.tif": 0,
              "b/palette.png": 50, "b/deep/er/0.bmp": 60}  # fmt: skip
    for i, name in enumerate(LISTING):
        if name not in UNREADABLE:
            pixels, label, own_name = source[i]
            assert own_name == name and pixels.mode == "RGB"
            assert set(np.unique(np.asarray(pixels))) == {values[name]}
            assert label == {"root.png": -1, "a": 0, "a-x": 1, "b": 2}[name.split("/")[0]]


@pytest.mark.parametrize("make, message", [
    (lambda p: p / "absent", "found nothing at"),
    (lambda p: p / "file.png", "found a file at"),
    (lambda p: p / "empty", "expected image files .* found none"),
])  # fmt: skip
def test_a_folder_that_holds_no_images(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    flat(1).save(tmp_path / "file.png")
    with pytest.raises(ValueError, match=message):
        data.open_images(f"folder:{make(tmp_path)}")


def test_hidden_system_and_looping_entries_are_left_out_in_words(tmp_path):
    photos = tmp_path / "photos"
    for name in ("cat", "dog/.ipynb_checkpoints", ".git", "__MACOSX/cat", "dog/@eaDir"):
        (photos / name).mkdir(parents=True)
        flat(1).save(photos / name / "1.png")
    flat(1).save(photos / "dog" / "2.png")
    flat(1).save(photos / "cat" / "._1.png")  # what macOS puts beside a file
    (photos / "cat" / ".DS_Store").write_text("no image: nothing to tell of")
    (photos / "cat" / "Thumbs.db").write_text("no image either")
    (photos / "dog" / "up").symlink_to(photos)
    (photos / "dog" / "here").symlink_to(photos / "dog", target_is_directory=True)
    (photos / "cat" / "self.png").symlink_to(photos / "cat" / "self.png")
    os.mkfifo(photos / "cat" / "pipe.png")
    with pytest.warns(UserWarning) as caught:
        source = data.open_images(f"folder:{photos}")
    (message,) = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert "left out 9 hidden, system or looping" in message and ".git" in message
    assert [source.name(i) for i in range(len(source))] == ["cat/1.png", "dog/2.png"]
    assert source.class_names == ("cat", "dog")


def test_a_link_to_another_folder_is_followed(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    flat(1).save(tmp_path / "elsewhere" / "deep" / "1.png")
    for name in ("a", "b"):  # twice the same one, on purpose
        (tmp_path / "photos" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    with pytest.warns(UserWarning, match="left out 2 .*a/back"):
        source = data.FolderSource(tmp_path / "photos")
    assert [source.name(i) for i in range(2)] == ["a/deep/1.png", "b/deep/1.png"]
    assert len(source) == 2


def test_a_folder_that_cannot_be_listed_stops(folder, monkeypatch):
    monkeypatch.setattr(reading, "WAITS", (0.0,))
    scandir, failed = os.scandir, []

    def away(path):
        if str(path).endswith("b/deep"):
            failed.append(path)
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", away)
    with pytest.raises(data.StorageError, match="Cannot read the folder .*b/deep.*Input/output"):
        data.FolderSource(folder)
    assert len(failed) == 2


def test_names_that_are_not_utf8_are_written_in_every_form(tmp_path):
    folder = tmp_path / "photos"
    odd = os.path.join(os.fsencode(folder), b"caf\xe9")
    os.makedirs(odd)
    flat(10).save(folder / "0.png")
    for name in (b"\xff1.png", "ünï.png".encode()):
        with open(os.path.join(odd, name), "wb") as file:
            flat(20).save(file, "PNG")
    (folder / os.fsdecode(b"caf\xe9") / "broken\udcfe.jpg").write_text("not an image")
    source = data.FolderSource(folder)
    names = [source.name(i) for i in range(4)]
    assert sorted(names) == sorted(
        ["0.png", "caf\\xe9/broken\\xfe.jpg", "caf\\xe9/ünï.png", "caf\\xe9/\\xff1.png"]
    )
    assert source.class_names == ("caf\\xe9",)
    assert [source.label(i) for i in range(4)] == [-1, 0, 0, 0]
    with pytest.warns(UserWarning, match=r"broken\\xfe.jpg"):
        (batch,) = data.image_batches(
            source, range(4), input_size=(4, 4), preparation="resize", batch_size=4
        )
    assert batch.mask.sum() == 3 and batch.names == names
    path = tmp_path / "table.parquet"
    runs.write_table(path, {"name": np.array(batch.names), "class": list(source.class_names) * 4})
    assert runs.read_table(path)["name"].tolist() == names
    runs.write_json(tmp_path / "names.json", names)
    assert runs.read_json(tmp_path / "names.json") == names
    assert len(source.content_hash) == 16
    deep = data.open_images(f"folder:{os.fsdecode(odd)}")
    assert deep.spec == f"folder:{folder}/caf\\xe9" and len(deep) == 3
    "\n".join((*names, deep.spec)).encode()  # as a page or a terminal wants them

    flat(1).save(folder / "caf\\xe9.png")
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.png"), "wb") as file:
        flat(2).save(file, "PNG")
    with pytest.raises(ValueError, match=r"two files are both shown as 'caf\\\\xe9.png'"):
        data.FolderSource(folder)


def test_a_large_tree_is_in_the_order_of_the_names(tmp_path):
    """As sorted by class, then folder, then file, one name after the other."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        parts = [
            str(rng.choice(["a", "a-b", "B", "a b", "z", "é"])) for _ in range(rng.integers(4))
        ]
        (tmp_path / Path(*parts)).mkdir(parents=True, exist_ok=True)
        (tmp_path / Path(*parts) / f"{rng.integers(99)}.png").touch()
    source = data.FolderSource(tmp_path)
    names = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")]
    first = lambda name: name.partition("/")[0] if "/" in name else ""
    expected = sorted(names, key=lambda name: (first(name), *name.rpartition("/")[::2]))
    assert [source.name(i) for i in range(len(source))] == expected
    classes = sorted({first(name) for name in names} - {""})
    assert list(source.class_names) == classes
    labels = [classes.index(first(name)) if first(name) else -1 for name in expected]
    assert [source.label(i) for i in range(len(source))] == labels


def test_pictures_of_other_kinds_are_told(tmp_path):
    for name in ("a.gif", "b.HEIC", "c.heic"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="found none, but 2 .heic, 1 .gif; convert them"):
        data.FolderSource(tmp_path)
    flat(1).save(tmp_path / "d.png")
    with pytest.warns(UserWarning, match="left out pictures of kinds .* 2 .heic, 1 .gif; convert"):
        assert len(data.FolderSource(tmp_path)) == 1
