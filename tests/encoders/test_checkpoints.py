"""Checkpoints are whole or refused, and know no devices."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ur_jax import devices
from ur_jax.encoders import checkpoints

# A restore that fails leaves a closed event loop of Orbax's behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

METADATA = {"encoder": "demo", "config": {"sizes": [1, 2]}, "source": "x.pth"}


def _variables():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        "params": {"conv": {"kernel": draw(3, 3, 8, 64)}, "norm": {"scale": draw(64)}},
        "batch_stats": {"norm": {"mean": draw(64)}},
    }


@pytest.fixture
def saved(tmp_path):
    checkpoints.save_encoder(tmp_path / "encoder", _variables(), METADATA)
    return tmp_path / "encoder"


def _assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _largest(directory):
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_round_trip(saved):
    variables, metadata = checkpoints.restore_encoder(saved)
    _assert_equal(variables, _variables())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(variables))
    assert metadata["config"] == {"sizes": [1, 2]} and metadata["source"] == "x.pth"
    assert metadata["versions"]["jax"] == jax.__version__


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.save_encoder("here", _variables(), METADATA)
    _assert_equal(checkpoints.restore_encoder("here")[0], _variables())


def test_saved_on_eight_devices_is_the_same(tmp_path, saved):
    replicated = devices.replicate(devices.data_mesh(), _variables())
    checkpoints.save_encoder(tmp_path / "eight", replicated, METADATA)
    eight, metadata = checkpoints.restore_encoder(tmp_path / "eight")
    _assert_equal(eight, _variables())
    assert metadata["weights_sha256"] == checkpoints.restore_encoder(saved)[1]["weights_sha256"]


def test_does_not_overwrite(saved):
    with pytest.raises(ValueError, match="exists; name another, remove it or overwrite it"):
        checkpoints.save_encoder(saved, _variables(), METADATA)
    other = jax.tree.map(lambda x: 2 * x, _variables())
    checkpoints.save_encoder(saved, other, METADATA, overwrite=True)
    _assert_equal(checkpoints.restore_encoder(saved)[0], other)
    # A new one that cannot be written leaves the old one whole.
    with pytest.raises(Exception, match="object"):
        bad = {"params": np.array([object()])}
        checkpoints.save_encoder(saved, bad, METADATA, overwrite=True)
    _assert_equal(checkpoints.restore_encoder(saved)[0], other)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_overwrites_nothing_but_a_checkpoint(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("...")
    with pytest.raises(ValueError, match="checkpoint to overwrite, but .* is something else"):
        checkpoints.save_encoder(tmp_path / "thesis", _variables(), METADATA, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


@pytest.fixture
def bucket(monkeypatch):
    """A folder stands for a bucket: what Orbax finished there has a last file."""
    monkeypatch.setattr(checkpoints, "is_in_bucket", lambda path: True)
    finished = lambda path: (path / "commit_success.txt").exists()
    monkeypatch.setattr(checkpoints.ocp.utils, "is_checkpoint_finalized", finished)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_copy_in_a_bucket_is_whole_without_the_last_file(saved, bucket, manifest):
    """As `cp -r` leaves it; nothing whole is replaced."""
    (saved / "commit_success.txt").unlink(missing_ok=True)
    if not manifest:  # of a version that wrote none
        (saved / "files.json").unlink()
    _assert_equal(checkpoints.restore_encoder(saved)[0], _variables())
    with pytest.raises(ValueError, match="exists; name another"):
        checkpoints.save_encoder(saved, _variables(), METADATA)
    shutil.rmtree(saved / "ocdbt.process_0")  # now it is half a checkpoint
    assert not checkpoints.is_saved(saved)


def test_metadata_are_needed(tmp_path):
    with pytest.raises(ValueError, match=r"Expected metadata with \['config'\]"):
        checkpoints.save_encoder(tmp_path / "x", _variables(), {"encoder": "demo"})
    assert not (tmp_path / "x").exists()


def test_missing_and_other_directories(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="no checkpoint .*nowhere"):
        checkpoints.restore_encoder(tmp_path / "nowhere")
    for other in (tmp_path, saved / "_METADATA"):
        with pytest.raises(ValueError, match=f"encoder checkpoint directory, but {other} has no"):
            checkpoints.restore_encoder(other)


def test_later_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_FORMAT", 2)
    checkpoints.save_encoder(tmp_path / "later", _variables(), METADATA)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 1 or before, got 2.*upgrade"):
        checkpoints.restore_encoder(tmp_path / "later")


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip"])
def test_damaged_weights(saved, harm):
    """Even one flipped bit, which Orbax itself would return as a weight, is found."""
    victim = _largest(saved)
    data = bytearray(victim.read_bytes())
    if harm == "delete":
        victim.unlink()
    elif harm == "truncate":
        victim.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: .*fetch it again"):
        checkpoints.restore_encoder(saved)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_damaged_structure(saved, name):
    for manifest in (True, False):
        if not manifest:
            (saved / "files.json").unlink()
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(ValueError, match="is damaged"):
            checkpoints.restore_encoder(saved)
        (saved / name).write_bytes(content)


def test_no_flipped_byte_passes(saved):
    """Anywhere in a checkpoint, its metadata included: the mean and std of an encoder lie there."""
    empty_of_meaning = "commit_success.txt"
    files = [f for f in sorted(saved.rglob("*")) if f.is_file() and f.name != empty_of_meaning]
    rng = np.random.default_rng(0)
    for _ in range(60):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=str(saved)):
            checkpoints.restore_encoder(saved)
        file.write_bytes(content)
    _assert_equal(checkpoints.restore_encoder(saved)[0], _variables())


def test_every_file_matters_or_the_weights_are_right(saved):
    for file in [f for f in saved.rglob("*") if f.is_file()]:
        data = file.read_bytes()
        file.unlink()
        try:
            _assert_equal(checkpoints.restore_encoder(saved)[0], _variables())
        except ValueError:
            pass
        file.write_bytes(data)


def test_tree_hash():
    hashed = checkpoints.tree_hash(_variables())
    other = _variables()
    other["params"]["norm"]["scale"][3] = 0
    renamed = {"other": _variables()["params"], "batch_stats": _variables()["batch_stats"]}
    halves = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), _variables())
    widened = jax.tree.map(lambda x: x.astype(np.float32), halves)
    assert hashed == checkpoints.tree_hash(jax.tree.map(jnp.asarray, _variables()))
    assert checkpoints.tree_hash(halves) == checkpoints.tree_hash(widened)
    assert len({hashed, *map(checkpoints.tree_hash, (other, renamed, halves))}) == 4
