"""The headline script: what it trains and measures, and its table."""

from __future__ import annotations

import reproduce_cifar

from ur_jax import runs
from ur_jax.report import collect as results
from ur_jax.stats.intervals import Estimate


def test_trains_then_measures_all_then_writes_the_table(tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    trained, measured = [], []
    monkeypatch.setattr(reproduce_cifar.train, "main", trained.append)

    def measure(config):
        measured.append(config)
        for text in config.encoders:
            row = lambda value, **kw: results.row(
                kw.pop("metric"), Estimate(value, 0.1, 0.5, 9), **kw
            )
            rows = [
                row(0.2, metric="universal_quantile", divergence="l2", eps=0.05, step=5),
                row(0.3, metric="universal_quantile", divergence="l2", eps=0.05, step=10),
                row(0.4, metric="universal_quantile", divergence="l1", eps=0.05, step=10),
            ]
            summary = {"schema": runs.SCHEMA, "config": {}, "metrics": rows}
            folder = config.workdir / text.partition("=")[0] / "attacks-0.05"
            runs.write_json(folder / "summary.json", summary)
        return 0

    monkeypatch.setattr(reproduce_cifar.benchmark, "main", measure)
    config = reproduce_cifar.Config(tmp_path, tmp_path / "out", fine_tunings=("targeted", "fare"))
    assert reproduce_cifar.main(config) == 0

    targeted, fare = trained
    assert (targeted.method, targeted.attack, targeted.init) == ("mocov2", "targeted", "demo")
    assert (fare.method, fare.attack, fare.adversary) == ("fare", "loss", config.adversary)
    [benchmark] = measured
    assert benchmark.encoders == (
        "demo", f"targeted={targeted.out / 'encoder'}", f"fare={fare.out / 'encoder'}"
    )  # fmt: skip
    # Probes never see test images; attacks and certificates see nothing else.
    assert benchmark.train_images.endswith("train") and benchmark.images.endswith("test")
    assert benchmark.test_images is None and benchmark.pet_images is None

    header, _, *rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "measure", "demo", "targeted", "fare"
    ]  # fmt: skip
    [row] = rows  # of the last step, in l2
    assert row.count("0.300 (0.100 to 0.500)") == 3 and "(eps 0.05, step 10)" in row
