"""Results on disk: atomic, claimed by one configuration, read back as written or not at all."""

from __future__ import annotations

import dataclasses
import os
import threading

import jax
import numpy as np
import pytest

from ur_jax import runs
from ur_jax.errors import DamagedError, UserError
from ur_jax.runs import lock


@dataclasses.dataclass(frozen=True)
class Settings:
    eps: float = 0.05
    steps: tuple[int, ...] = (5, 10)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    runs.write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"value": object()})
    with pytest.raises(RuntimeError), runs.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert runs.read_json(path) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    values = {"a": [np.float32(np.inf), 1.5], "b": {"c": float("nan")}}
    runs.write_json(tmp_path / "a.json", values)
    assert runs.read_json(tmp_path / "a.json") == {"a": [None, 1.5], "b": {"c": None}}


def test_no_flipped_byte_and_no_cut_passes_for_what_was_written(tmp_path):
    """Every 16th byte of a JSON file and of a part, flipped; both cut at as many places."""
    run = runs.open_run(tmp_path / "run", {"eps": 0.05})
    arrays = {"x": np.arange(40.0), "unreadable": np.array([["a", "b"]])}
    run.write_part("stage", 0, arrays)
    runs.write_json(tmp_path / "a.json", {"value": 0.123456789, "names": ["a", "b"]})
    whole = {"value": 0.123456789, "names": ["a", "b"]}
    tried = 0
    for path, read in (
        (tmp_path / "a.json", lambda: runs.read_json(tmp_path / "a.json")),
        (run.part("stage", 0), lambda: run.read_parts("stage")),
    ):
        content = path.read_bytes()
        for place in range(0, len(content), 16):
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place // 16 % 8)
            for damaged in (bytes(flipped), content[:place]):
                path.write_bytes(damaged)
                tried += 1
                try:
                    found = read()
                except DamagedError as error:
                    assert str(path) in str(error)
                else:  # a byte that means nothing, such as a space between two values
                    if path.suffix == ".json":
                        assert found == whole
                    else:
                        jax.tree.map(np.testing.assert_array_equal, found, arrays)
    assert tried > 150


def test_one_command_at_a_time_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED_EVERY", 0.05)
    monkeypatch.setattr(lock, "_STALE_AFTER", 0.3)
    with lock.held(tmp_path):
        with lock.held(tmp_path / "inside"):
            assert not (tmp_path / "inside").exists()  # the outer lease covers it
        mine = runs.read_json(tmp_path / lock.NAME)
        assert mine["pid"] == os.getpid()
    assert not (tmp_path / lock.NAME).exists()
    # Of another host that renews it, of one that does not, and of a process here that is gone.
    other = mine | {"host": "elsewhere", "owner": "x"}
    runs.write_json(tmp_path / lock.NAME, other)
    stopped = threading.Event()
    renewing = threading.Thread(target=lock._renew, args=(tmp_path, other, stopped))
    renewing.start()
    try:
        with pytest.raises(UserError, match="in use by .* on elsewhere"), lock.held(tmp_path):
            pass
    finally:
        stopped.set()
        renewing.join()
    for before in (other, mine | {"pid": 2**22 + 1}):
        runs.write_json(tmp_path / lock.NAME, before)
        with lock.held(tmp_path):
            assert runs.read_json(tmp_path / lock.NAME)["owner"] != "x"


def test_tables_round_trip(tmp_path):
    columns = {"i": np.arange(3), "x": np.float32([0.5, np.nan, 2]), "name": ["a", "b", "c"]}
    runs.write_table(tmp_path / "t.parquet", columns)
    back = runs.read_table(tmp_path / "t.parquet")
    np.testing.assert_array_equal(back["i"], columns["i"])
    np.testing.assert_array_equal(back["x"], columns["x"])
    assert back["x"].dtype == np.float32 and list(back["name"]) == ["a", "b", "c"]


def test_parts_join_and_count_without_gaps(tmp_path):
    run = runs.open_run(tmp_path / "run", {})
    for number in (0, 1, 3):
        run.write_part("stage", number, {"x": np.full(2, number)})
    assert run.num_parts("stage") == 2 and run.num_parts("other") == 0
    np.testing.assert_array_equal(run.read_parts("stage")["x"], [0, 0, 1, 1])


def test_a_folder_belongs_to_one_configuration(tmp_path):
    config = {"settings": Settings(), "images": "demo", "weights": np.float32(1)}
    runs.open_run(tmp_path / "run", config)
    runs.open_run(tmp_path / "run", config)
    with pytest.raises(ValueError, match=r"settings.eps: 0.05 there, 0.1 now.*--out"):
        runs.open_run(tmp_path / "run", config | {"settings": Settings(eps=0.1)})
    with pytest.raises(ValueError, match="images: 'demo' there, None now"):
        runs.open_run(tmp_path / "run", {"settings": Settings(), "weights": 1.0})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="neither"):
        runs.open_run(tmp_path / "other", config)


def test_fingerprint_depends_on_values_alone():
    assert runs.fingerprint(Settings()) == runs.fingerprint({"steps": [5, 10], "eps": 0.05})
    assert runs.fingerprint(Settings()) != runs.fingerprint(Settings(eps=0.1))
