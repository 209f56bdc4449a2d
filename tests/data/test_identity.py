"""What identifies images: content alone, kept in a cache that never lies."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from given_images import make_encoder
from PIL import Image

from ur_jax import data
from ur_jax.data import identity, reading


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of its own, which recalls files however new they are."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(identity, "_SETTLED_NS", 0)
    monkeypatch.setattr(reading, "WAITS", (0.0, 0.0))
    return folder / "ur_jax" / "images"


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for i in range(6):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.bmp")
    return folder


def hash_of(folder) -> str:
    return data.FolderSource(folder).content_hash


@pytest.fixture
def hashed(monkeypatch):
    """The paths whose bytes were read."""
    read, original = [], identity._hash_one
    monkeypatch.setattr(identity, "_hash_one", lambda path: read.append(path) or original(path))
    return read


def test_place_and_date_do_not_matter_and_everything_else_does(photos, tmp_path):
    expected = hash_of(photos)
    assert len(expected) == 16 and int(expected, 16)
    for copy in (shutil.copytree(photos, tmp_path / "copy"), photos.rename(tmp_path / "moved")):
        os.utime(copy / "a" / "0.bmp", (1, 1))
        os.chmod(copy / "a" / "2.bmp", 0o600)
        assert hash_of(copy) == expected
    other = set()
    moved = tmp_path / "moved"
    first, second = (moved / "a" / "0.bmp", moved / "b" / "1.bmp")
    pixels = first.read_bytes(), second.read_bytes()
    first.write_bytes(pixels[1])  # other pixels of the same size under the same name
    other.add(hash_of(moved))
    second.write_bytes(pixels[0])  # exchanged
    other.add(hash_of(moved))
    first.write_bytes(pixels[0])
    second.write_bytes(pixels[1])
    assert hash_of(moved) == expected
    second.rename(moved / "b" / "9.bmp")
    other.add(hash_of(moved))
    (moved / "b" / "9.bmp").rename(moved / "a" / "1.bmp")  # another class
    other.add(hash_of(moved))
    (moved / "a" / "1.bmp").unlink()
    other.add(hash_of(moved))
    assert len(other) == 5 and expected not in other


def test_bytes_are_read_once_and_again_where_a_file_changed(photos, hashed):
    expected = hash_of(photos)
    assert len(hashed) == 6
    assert hash_of(photos) == expected and len(hashed) == 6
    hashed.clear()
    (photos / "a" / "new.bmp").write_bytes((photos / "a" / "0.bmp").read_bytes())
    path = photos / "b" / "3.bmp"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `rsync --times` leaves it
    assert hash_of(photos) != expected
    assert {os.path.basename(name) for name in hashed} == {b"new.bmp", b"3.bmp"}


def test_a_file_that_has_just_changed_is_not_recalled(photos, hashed, monkeypatch):
    """It might change again within one tick of the file system's clock and look the same."""
    monkeypatch.setattr(identity, "_SETTLED_NS", 10**12)
    assert hash_of(photos) == hash_of(photos) and len(hashed) == 12


@pytest.mark.parametrize("damage", [
    lambda content: content[:-40], lambda content: b"", lambda content: b"no hashes",
    lambda content: content.replace(b"hashes 1", b"hashes 2"),
])  # fmt: skip
def test_a_damaged_cache_is_made_anew(photos, cache, hashed, damage):
    expected = hash_of(photos)
    (kept,) = cache.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert hash_of(photos) == expected and len(hashed) == 12
    assert hash_of(photos) == expected and len(hashed) == 12


def test_every_flipped_byte_of_a_cache_is_seen(photos, cache):
    expected = hash_of(photos)
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    for place in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 0x41
        kept.write_bytes(damaged)
        assert hash_of(photos) == expected, place


def test_a_cache_that_cannot_be_written_is_said(photos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="computed anew.*XDG_CACHE_HOME"):
        assert len(hash_of(photos)) == 16


def test_several_at_once(photos):
    found = []
    threads = [threading.Thread(target=lambda: found.append(hash_of(photos))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_what_cannot_be_read_is_named_and_what_was_read_is_kept(photos, hashed, monkeypatch):
    monkeypatch.setattr(identity, "_CHUNK", 3)
    (photos / "b" / "z.png").symlink_to(photos / "away" / "z.png")
    with pytest.raises(data.StorageError, match=r"Cannot read .*b/z.png.*No such file"):
        hash_of(photos)
    hashed.clear()
    (photos / "b" / "z.png").unlink()
    hash_of(photos)
    assert hashed == []


def test_demo_views_and_a_source_of_ones_own():
    class Squares(data.ImageSource):
        spec, class_names = "squares", ("dark",)

        def __init__(self, *values):
            self.values = values

        def __len__(self):
            return len(self.values)

        def name(self, index):
            return f"square {index}"

        def __getitem__(self, index):
            value = self.values[index]
            if value is None:
                raise ValueError("lost")
            return data.Example(Image.new("RGB", (3, 3), (value,) * 3), 0, self.name(index))

    seen = {Squares(*values).content_hash for values in ((1, 2), (1, 2), (2, 1), (1, None), (1,))}
    assert len(seen) == 4
    assert data.DemoSource().content_hash == data.open_images("demo").content_hash

    source, encoder = Squares(1, 2), make_encoder((8, 8))
    views = lambda kind="noisy", of=source, draw=0: data.ProbeViews(
        of, encoder, data.ViewConfig(kind), random=False, draw=draw
    )
    assert views().content_hash == views(of=Squares(1, 2)).content_hash
    others = {views("standard"), views(draw=1), views(of=Squares(1, 3))}
    assert views().content_hash not in {view.content_hash for view in others}


def test_an_interruption_does_not_wait_for_what_is_being_read(photos, monkeypatch):
    begun = []

    def slow(path):
        begun.append(path)
        if len(begun) == 2:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # Ctrl-C
        time.sleep(0.02)
        return (1, 1, 1, 1), bytes(16)

    monkeypatch.setattr(identity, "_hash_one", slow)
    monkeypatch.setattr(identity, "_THREADS", 2)
    monkeypatch.setattr(identity, "_CHUNK", 1000)
    names = [f"{i}.png" for i in range(4000)]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        identity.hash_files(photos, names)
    assert time.monotonic() - start < 5 and len(begun) < 400
