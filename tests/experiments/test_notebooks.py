"""The notebooks run from a clean namespace, on a tiny encoder; they are kept without outputs."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import tiny_encoder

from ur_jax.encoders import loading

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks"
NOISE = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
FEW = {"num_images": 8, "stages": ("attacks",), "eps": (0.05,), "read_at": (2,), "batch_size": 8}
FEWER = {"num_images": 2, "n0": 200, "n": 300, "alpha1": 0.05, "alpha2": 0.05, "delta": 0.15}
PARAMETERS = {
    "your_encoder": {"settings": FEW},
    "certify": {"settings": FEWER},
    "make_it_robust": {
        "settings": FEW,
        "training": {"num_epochs": 1, "batch_size": 8, "view_size": None},
        "out": "out",
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    with tiny_encoder.stands_for_demo():
        for name in ("demo", "demo-robust"):
            tiny_encoder.save(tmp_path / name)
        monkeypatch.setattr(loading, "_PRETRAINED", tmp_path)
        names: dict = {}
        for cell in cells:
            text = "".join(cell["source"])
            if "jax_num_cpu_devices" in text:
                continue  # the tests have their own number of them
            exec(compile(text, path.name, "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= {"images": NOISE} | PARAMETERS[path.stem]
