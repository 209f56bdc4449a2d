"""Batches: subsets, one static shape, what cannot be read, bad arguments."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from given_images import UNREADABLE, flat, write_images
from PIL import UnidentifiedImageError

from ur_jax import data
from ur_jax.data import batches, reading

SMALL: dict[str, Any] = {"input_size": (8, 12), "preparation": "resize"}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    return tmp_path


@pytest.mark.parametrize("total, n", [(1_440_191, 1000), (1_440_191, 2000), (512, 64), (7, 7)])
def test_evenly_spaced_is_the_integer_formula(total, n):
    indices = data.evenly_spaced(total, n)
    assert indices.tolist() == [i * (total - 1) // (n - 1) for i in range(n)]
    assert len(set(indices.tolist())) == n


def test_evenly_spaced_edges_and_errors():
    assert data.evenly_spaced(5, 1).tolist() == [0]
    with pytest.raises(ValueError, match="101 samples.* 100 images.*--num-clean 100 or fewer"):
        data.evenly_spaced(100, 101, what="num_clean")
    assert data.evenly_spaced(np.int32(5), np.uint8(2)).tolist() == [0, 4]
    bad: list[Any] = [2.0, 2.5, True, None, "2", np.float32(2), float("nan")]
    for n in bad:
        with pytest.raises(ValueError, match="num_images as a whole number, got"):
            data.evenly_spaced(100, n)
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        data.evenly_spaced(100, 0)


def test_unreadable_images_are_masked_named_and_never_fatal(folder):
    source = data.open_images(f"folder:{folder}")
    with pytest.warns(UserWarning) as caught:
        batches = list(data.image_batches(source, range(11), batch_size=4, **SMALL))
    warned = [str(w.message) for w in caught if "unreadable" in str(w.message)]
    listed = [unreadable.name for batch in batches for unreadable in batch.unreadable]
    assert set(listed) == UNREADABLE and len(listed) == len(warned) == 5
    for name in UNREADABLE:
        assert sum(name in message for message in warned) == 1
    for batch in batches:
        for name, readable, pixels in zip(batch.names, batch.mask, batch.images):
            assert not (readable and name in UNREADABLE)
            assert readable or name in UNREADABLE or name == batch.names[-1]
            assert np.ptp(pixels) == 0 and 0 <= pixels.min() and pixels.max() <= 1
    assert sum(batch.mask.sum() for batch in batches) == 6
    # The reasons go into results, which must not change when a run is repeated.
    with pytest.warns(UserWarning):
        again = list(data.image_batches(source, range(11), batch_size=4, **SMALL))
    assert [b.unreadable for b in again] == [b.unreadable for b in batches]


def test_load_uint8_leaves_out_the_unreadable(folder):
    source = data.open_images(f"folder:{folder}")
    with pytest.warns(UserWarning, match="unreadable"):
        loaded = data.load_uint8(source, [10, 2, 1, 0], **SMALL)
    assert loaded.images.shape == (3, 8, 12, 3) and loaded.images.dtype == np.uint8
    assert loaded.images[:, 0, 0, 0].tolist() == [60, 20, 10]
    assert loaded.labels.tolist() == [2, 0, -1] and loaded.labels.dtype == np.int32
    assert loaded.indices.tolist() == [10, 1, 0]
    assert [name for name, _ in loaded.unreadable] == ["a/empty.jpg"]


def test_every_batch_has_the_same_shape_and_the_last_is_padded():
    source = data.open_images("demo")
    indices = data.evenly_spaced(512, 10)[::-1]
    arguments: dict[str, Any] = {
        "input_size": (16, 20), "preparation": "resize_crop", "batch_size": 4
    }  # fmt: skip
    batches = list(data.image_batches(source, indices, **arguments))
    assert len(batches) == 3
    for batch in batches:
        assert batch.images.shape == (4, 16, 20, 3) and batch.images.dtype == np.float32
        assert batch.labels.dtype == np.int32 and batch.indices.dtype == np.int64
        assert batch.names == [source.name(i) for i in batch.indices] and not batch.unreadable
    assert batches[-1].mask.tolist() == [True, True, False, False]
    assert batches[-1].indices.tolist() == [indices[8], *[indices[9]] * 3]
    np.testing.assert_array_equal(batches[-1].images[2], batches[-1].images[1])
    kept = np.concatenate([batch.indices[batch.mask] for batch in batches])
    np.testing.assert_array_equal(kept, indices)
    for row, index in enumerate(indices[:4]):
        pixels = data.prepare(source[index].pixels, input_size=(16, 20), preparation="resize_crop")
        np.testing.assert_array_equal(
            batches[0].images[row], pixels.astype(np.float32) / np.float32(255)
        )
        assert batches[0].labels[row] == index // 64
    resumed = list(data.image_batches(source, indices, start=2, **arguments))
    assert len(resumed) == 1
    np.testing.assert_array_equal(resumed[0].images, batches[2].images)
    assert list(data.image_batches(source, indices, start=3, **arguments)) == []
    assert list(data.image_batches(source, [], **arguments)) == []


def test_workers_give_what_threads_give(folder):
    (folder / "b" / "z.png").symlink_to(folder / "nowhere" / "z.png")  # its storage is away
    source = data.FolderSource(folder)
    indices = [i for i in range(12) if source.name(i) != "b/z.png"]
    away = [source.name(i) for i in range(12)].index("b/z.png")
    with pytest.warns(UserWarning, match="unreadable"):
        here = list(data.image_batches(source, indices, batch_size=3, **SMALL))
        batches = data.image_batches(
            source, [*indices, indices[-1], away], batch_size=3, num_workers=2, **SMALL
        )
        there = [next(batches) for _ in here]
    with pytest.raises(data.StorageError, match=r"Cannot read b/z.png of 'folder:.*No such"):
        next(batches)
    assert len(here) == 4
    for one, other in zip(here, there, strict=True):
        assert one.names == other.names and one.unreadable == other.unreadable
        for field in ("images", "labels", "indices"):
            assert type(getattr(other, field)) is np.ndarray  # not a worker's shared memory
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert one is here[-1] or (one.mask == other.mask).all()


@pytest.mark.parametrize("change, message", [
    ({"indices": [0, 512]}, r"indices in \[0, 512\).*'demo'.* 0 to 512"),
    ({"indices": [-1]}, "-1 to -1"),
    ({"indices": [[0]]}, "flat list"),
    ({"indices": [0.0, 1.0]}, "indices as whole numbers, got float64"),
    ({"indices": [True, False]}, "indices as whole numbers, got bool"),
    ({"batch_size": 0}, "batch_size >= 1"),
    ({"batch_size": 2.0}, "batch_size as a whole number, got 2.0"),
    ({"batch_size": True}, "batch_size as a whole number, got True"),
    ({"batch_size": 100_000}, "at most 4096 for 8 images, got 100000; give --batch-size 64"),
    ({"batch_size": 4096, "input_size": (20_000, 20_000)}, "batch_size to fit in memory, got 4096"),
    ({"num_workers": -1}, "num_workers >= 0"),
    ({"num_workers": 10_000}, "at most .* cores of this machine, got 10000; give --num-workers"),
    ({"num_workers": 1.5}, "num_workers as a whole number"),
    ({"input_size": (8.5, 8)}, "each side of input_size as a whole number, got 8.5"),
    ({"input_size": (0, 8)}, "positive .height, width."),
    ({"preparation": "crop"}, "Unknown preparation 'crop'"),
    ({"start": 3}, r"start in \[0, 2\]"),
])  # fmt: skip
def test_bad_arguments_fail_at_the_call(change, message):
    arguments = dict(indices=range(8), batch_size=4, **SMALL) | change
    with pytest.raises(ValueError, match=message):
        data.image_batches(data.open_images("demo"), arguments.pop("indices"), **arguments)


def test_a_source_of_ones_own():
    class Squares(data.ImageSource):
        spec = "squares"

        def __len__(self):
            return 3

        def name(self, index):
            return f"square {index}"

        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("lost")
            return data.Example(flat(index), -1, self.name(index))

    with pytest.warns(UserWarning, match="square 1: RuntimeError: lost"):
        (batch,) = data.image_batches(Squares(), range(3), batch_size=3, **SMALL)
    assert batch.mask.tolist() == [True, False, True]


class Flaky(data.ImageSource):
    """Eight images; reading number 5 fails as often as `failures` says, in its own way."""

    spec = "flaky"

    def __init__(self, failures: int, error: Exception):
        self.failures, self.error, self.tries = failures, error, 0

    def __len__(self):
        return 8

    def name(self, index):
        return f"image {index}"

    def __getitem__(self, index):
        if index == 5:
            self.tries += 1
            if self.tries <= self.failures:
                raise self.error
        return data.Example(flat(index), -1, self.name(index))


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(reading, "WAITS", (0.0, 0.0, 0.0))


def test_a_passing_fault_of_the_storage_passes_unseen(hasty):
    source = Flaky(3, OSError(errno.EIO, "Input/output error"))
    batches = list(data.image_batches(source, range(8), batch_size=4, **SMALL))
    assert source.tries == 4 and all(batch.mask.all() for batch in batches)
    assert batches[1].images[1, 0, 0, 0] == np.float32(5) / np.float32(255)


@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error"), FileNotFoundError(errno.ENOENT, "gone", "5.png"),
    OSError(errno.ESTALE, "Stale file handle"), TimeoutError(errno.ETIMEDOUT, "timed out"),
    PermissionError(errno.EACCES, "Permission denied"),
])  # fmt: skip
@pytest.mark.parametrize("load", ["image_batches", "load_uint8"])
def test_storage_that_stays_away_stops_with_one_line(hasty, load, error):
    source = Flaky(99, error)
    arguments = SMALL if load == "load_uint8" else {**SMALL, "batch_size": 4}
    match = r"Cannot read image 5 of 'flaky': .*What is finished is kept.*repeat the command\."
    with pytest.raises(data.StorageError, match=match) as raised:
        list(getattr(data, load)(source, range(8), **arguments))
    assert "\n" not in str(raised.value)
    assert source.tries == (1 if isinstance(error, PermissionError) else 4)


def test_what_does_not_decode_is_no_fault_of_the_storage(hasty):
    """Pillow's errors about content are `OSError` too, without a number."""
    for error in (OSError("image file is truncated"), UnidentifiedImageError("no format"),
                  SyntaxError("broken PNG"), EOFError()):  # fmt: skip
        source = Flaky(99, error)
        with pytest.warns(UserWarning, match="Skipped the unreadable image image 5"):
            batches = list(data.image_batches(source, range(8), batch_size=4, **SMALL))
        assert source.tries == 1 and sum(batch.mask.sum() for batch in batches) == 7
    with pytest.raises(MemoryError):  # says nothing about the image either
        list(data.image_batches(Flaky(99, MemoryError()), range(8), batch_size=4, **SMALL))


@pytest.mark.parametrize(
    "cores, size, threads", [(2, 224, 4), (16, 224, 16), (64, 32, 32), (64, 224, 27)]
)
def test_a_thread_for_each_core_as_far_as_their_batches_fit(cores, size, threads, monkeypatch):
    monkeypatch.setattr(batches.os, "cpu_count", lambda: cores)
    assert batches._num_threads(256 * 3 * size**2) == threads
