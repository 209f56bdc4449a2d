"""Results on disk: atomic, claimed by one configuration, read back as written."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ur_jax import runs


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
    assert json.loads(path.read_text()) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    values = {"a": [np.float32(np.inf), 1.5], "b": {"c": float("nan")}}
    runs.write_json(tmp_path / "a.json", values)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}


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
