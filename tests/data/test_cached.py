"""The cache of decoded images: the same batches, written once, whole or not at all, by content."""

from __future__ import annotations

import os
import pathlib
import pickle
import time
import warnings
from typing import Any

import numpy as np
import pytest
from given_images import UNREADABLE, make_encoder, synthetic, write_images
from PIL import Image

from ur_jax import data
from ur_jax.data import cached
from ur_jax.errors import UserError
from ur_jax.jobs.knn import Knn
from ur_jax.jobs.progress import quiet

SMALL: dict[str, Any] = {"input_size": (8, 12), "preparation": "resize"}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images")
    for number in range(3):
        picture = Image.fromarray(synthetic(number, 30, 40))
        picture.save(tmp_path / "images" / "a" / f"photo{number}.jpg")
    return tmp_path / "images"


def loaded(source, **changed) -> list[tuple]:
    """Everything of the batches of a source, comparable; warnings of unreadable images too."""
    arguments = {"batch_size": 4, **SMALL, **changed}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = list(data.image_batches_uint8(source, range(len(source)), **arguments))
    assert len([w for w in caught if "unreadable" in str(w.message)]) == len(UNREADABLE)
    return [tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in b) for b in batches]


def files(cache: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def never(*args, **kwargs):
    raise AssertionError("decoded again")


def test_batches_are_those_without_it_and_nothing_is_decoded_twice(folder, tmp_path, monkeypatch):
    source, cache = data.open_images(f"folder:{folder}"), tmp_path / "cache"
    kept = data.CachedImages(source, cache)
    expected = loaded(source)
    assert loaded(kept) == expected  # written by the first pass
    written = {path: path.stat().st_mtime_ns for path in files(cache)}
    assert written and all(path.suffix == ".images" for path in written)
    assert (kept.content_hash, kept.spec, kept.label(0)) == (
        source.content_hash, source.spec, source.label(0)
    )  # fmt: skip
    monkeypatch.setattr(cached, "prepare", never)
    monkeypatch.setattr(cached, "read", never)
    again = data.CachedImages(data.open_images(f"folder:{folder}"), cache)
    assert loaded(kept) == loaded(again) == expected
    # Another batch size, order and number of threads take the same files.
    assert [row for b in loaded(again, batch_size=3) for row in b[5]] == [
        row for b in expected for row in b[5]
    ]
    assert {path: path.stat().st_mtime_ns for path in files(cache)} == written


def test_a_worker_process_gets_it_and_sees_what_others_wrote(folder, tmp_path, monkeypatch):
    source = data.open_images(f"folder:{folder}")
    kept = data.CachedImages(source, tmp_path / "cache")
    worker = pickle.loads(pickle.dumps(kept))
    assert loaded(worker) == loaded(source)
    monkeypatch.setattr(cached, "prepare", never)
    assert loaded(kept) == loaded(pickle.loads(pickle.dumps(kept))) == loaded(worker)


def test_another_content_size_or_filter_is_another_folder(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    for changed in ({}, {"preparation": "resize-bicubic"}, {"input_size": (8, 8)}):
        source = data.open_images(f"folder:{folder}")
        assert loaded(data.CachedImages(source, cache), **changed) == loaded(source, **changed)
    assert len(list(cache.iterdir())) == 3
    Image.fromarray(synthetic(9, 30, 40)).save(folder / "a" / "photo1.jpg")
    source = data.open_images(f"folder:{folder}")
    assert loaded(data.CachedImages(source, cache)) == loaded(source)
    assert len(list(cache.iterdir())) == 4
    cached._decoder.cache_clear()
    monkeypatch.setattr(cached.features, "version", lambda name: "another")  # of Pillow
    assert loaded(data.CachedImages(source, cache)) == loaded(source)
    assert len(list(cache.iterdir())) == 5
    cached._decoder.cache_clear()


@pytest.mark.parametrize("harm", ["empty", "shorter", "table", "pixel", "longer", "gone"])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_damaged_file_is_removed_and_its_images_are_decoded_anew(folder, tmp_path, harm, is_open):
    source, cache = data.open_images(f"folder:{folder}"), tmp_path / "cache"
    expected, kept = loaded(source), data.CachedImages(source, cache)
    loaded(kept)
    path = max(files(cache), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    place = {"table": 70, "pixel": len(content) - 1}.get(harm, 0)
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    harmed = {"empty": b"", "shorter": content[:-1], "longer": content + b"x"}.get(harm, flipped)
    path.unlink()  # else what is mapped would change under whoever has it open
    if harm != "gone":
        path.write_bytes(harmed)
    if not is_open:
        kept = data.CachedImages(source, cache)
    assert loaded(kept) == expected
    after = data.CachedImages(source, cache)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*image cache.*damaged")
        assert loaded(after) == expected
    assert is_open or harm == "pixel" or path.read_bytes() == content  # or in another file


def test_what_was_left_by_a_kill_is_no_file_of_it(folder, tmp_path):
    source, cache = data.open_images(f"folder:{folder}"), tmp_path / "cache"
    loaded(data.CachedImages(source, cache))
    path = files(cache)[0]
    path.rename(path.with_name(f".{path.name}.host.1.tmp"))
    assert loaded(data.CachedImages(source, cache)) == loaded(source)
    assert path.exists()


def test_a_place_that_cannot_be_written_or_is_no_folder_ends_in_one_line(
    folder, tmp_path, monkeypatch
):
    source, cache = data.open_images(f"folder:{folder}"), tmp_path / "cache"
    with pytest.raises(data.StorageError, match="Cannot write the image cache .*make room"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            loaded(data.CachedImages(source, cache))
    give_up = time.monotonic() + 10
    left = {path for path in files(cache) if path.suffix == ".tmp"}
    while left and time.monotonic() < give_up:  # other threads write on, and end in their own time
        left &= set(files(cache))
    assert not left
    loaded(data.CachedImages(source, cache))
    monkeypatch.setattr(os, "fsync", never)  # a cache that is whole is not written
    loaded(data.CachedImages(source, cache))
    (tmp_path / "file").write_text("")
    for place, match in (("gs://bucket/cache", "a folder of a file system"),
                         (tmp_path / "file", "got the file")):  # fmt: skip
        with pytest.raises(UserError, match=match):
            data.CachedImages(source, place)


def no_space(number: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_job_gives_the_same_numbers_with_it(folder, tmp_path, monkeypatch):
    (folder / "root.png").unlink()  # of no class
    job = Knn(encoder=make_encoder((8, 8)), images=f"folder:{folder}",
              test_images=f"folder:{folder}", k=3)  # fmt: skip
    with pytest.warns(UserWarning, match="unreadable"):
        plain = job.run(tmp_path / "plain", progress=quiet)
        first = job.run(tmp_path / "first", progress=quiet, image_cache=tmp_path / "cache")
        monkeypatch.setattr(cached, "prepare", never)
        again = job.run(tmp_path / "again", progress=quiet, image_cache=tmp_path / "cache")
    assert plain.rows == first.rows == again.rows and plain.identity == again.identity
    assert plain.unreadable == first.unreadable == again.unreadable and len(plain.unreadable) == 5
    for table in (tmp_path / "plain").glob("*.parquet"):
        for run in ("first", "again"):
            assert table.read_bytes() == (tmp_path / run / table.name).read_bytes()
