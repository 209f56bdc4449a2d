"""The table of attacks: a row each, of which a second run computes none again."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ur_jax import cli
from ur_jax.encoders import from_fn
from ur_jax.errors import UserError
from ur_jax.jobs import attack_table, attack_table_kinds

WEIGHT = np.random.default_rng(0).normal(size=(192, 4)).astype(np.float32)


def linear(weight, images):
    return images.reshape(len(images), -1) @ weight


def test_rows_are_kept_and_only_missing_ones_are_computed(tmp_path, monkeypatch, capsys):
    encoder = from_fn(linear, jnp.asarray(WEIGHT), input_size=(8, 8))
    monkeypatch.setattr(attack_table_kinds.loading, "load_encoder", lambda place: encoder)
    words = (
        "--encoders mine --images demo --num-images 3 --num-clean 8 --eps 0.05 --budget 2".split()
    )
    words += ["--csv", str(tmp_path / "deep" / "rows.csv"), "--only", "APGD", "APGD, cosine"]
    words += ["one for all", "patch 4x4", "--patch", "4"]
    config = cli.parse(cli.find("attack-table"), words)
    assert attack_table.main(config) == 0
    before = (tmp_path / "deep" / "rows.csv").read_bytes()
    assert before.count(b"\n") == 5 and b'"APGD, cosine"' in before
    monkeypatch.setattr(attack_table_kinds.loading, "load_encoder", None)
    assert attack_table.main(config) == 0
    assert (tmp_path / "deep" / "rows.csv").read_bytes() == before
    assert capsys.readouterr().out.count("| mine | 0.05 | APGD, cosine |") == 3
    row = attack_table._read(config.csv)["mine", "0.05", "APGD"]
    assert float(row["median_distance"]) > 0 and row["gradient_steps"] == "2"
    assert float(attack_table._read(config.csv)["mine", "1", "patch 4x4"]["median_distance"]) > 0
    with pytest.raises(UserError, match="did you mean 'APGD'"):
        attack_table.main(cli.parse(cli.find("attack-table"), [*words, "--only", "APDG"]))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    words[words.index("--csv") + 1] = str(tmp_path / "other.csv")
    with pytest.raises(UserError, match="a file of this command"):
        attack_table.main(cli.parse(cli.find("attack-table"), words))
