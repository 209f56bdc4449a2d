"""The headline script: what it trains and measures, and its table."""

from __future__ import annotations

import dataclasses

import pytest

from ur_jax import cli, runs
from ur_jax.errors import UserError
from ur_jax.jobs import reproduce_cifar
from ur_jax.jobs.train import Train
from ur_jax.runs import Row, Summary
from ur_jax.stats.intervals import Estimate
from ur_jax.training import LoreConfig


@pytest.fixture
def data(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    return tmp_path


def test_trains_then_measures_all_then_writes_the_table(data, tmp_path, monkeypatch):
    trained, measured = {}, []
    monkeypatch.setattr(Train, "run", lambda job, out, **_: trained.update({out: job}))

    def measure(config):
        measured.append(config)
        # As a training leaves it: no stage of the table.
        Summary("train", "", {}, ()).write(config.workdir / "training" / "fare")
        for text in config.encoders:
            row = lambda value, **kw: Row.of(
                "universal_quantile", Estimate(value, 0.1, 0.5, 9), eps=0.05, **kw
            )
            rows = (
                row(0.2, divergence="l2", step=5),
                row(0.3, divergence="l2", step=10),
                row(0.4, divergence="l1", step=10),
            )
            folder = config.workdir / text.partition("=")[0] / "attacks-0.05"
            Summary("evaluate", "", {"stages": ["attacks"]}, rows).write(folder)
        return 0

    monkeypatch.setattr(reproduce_cifar.benchmark, "main", measure)
    words = ["--data", str(data), "--workdir", str(tmp_path / "out")]
    command = cli.find("reproduce-cifar")
    config = cli.parse(command, [*words, "--fine-tunings", "targeted", "fare"])
    assert command.main(config) == 0

    (targeted_at, targeted), (fare_at, fare) = trained.items()
    assert (targeted.method.name, targeted.attack, targeted.init) == ("mocov2", "targeted", "demo")
    assert (fare.method.name, fare.attack, fare.adversary) == ("fare", "loss", config.adversary)
    [benchmark] = measured
    assert benchmark.encoders == (
        "demo", f"targeted={targeted_at / 'encoder'}", f"fare={fare_at / 'encoder'}"
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


def test_the_recipes_are_those_that_the_published_numbers_were_made_with(data, tmp_path):
    config = reproduce_cifar.Config(data, tmp_path / "out")
    loss, fare = (reproduce_cifar.training(config, name) for name in ("loss", "fare"))
    assert (loss.learning_rate, loss.optimizer, loss.warmup_epochs) == (0.03, "sgd", 0.1)
    assert (fare.learning_rate, fare.optimizer, fare.warmup_epochs) == (1e-3, "adamw", 0.1)
    noisy = dataclasses.replace(config, noise=0.1)
    assert reproduce_cifar.training(noisy, "fare-noise").method.noise == 0.1
    assert reproduce_cifar.training(noisy, "fare").method.noise == 0
    assert reproduce_cifar.training(noisy, "loss") == loss
    for job in (loss, fare):
        assert (job.num_images, job.num_epochs, job.batch_size) == (30_000, 1, 128)
        assert (job.adversary.eps, job.adversary.step_size, job.adversary.num_steps) == (
            0.05, 0.02, 3
        )  # fmt: skip


def test_a_folder_without_the_two_splits(tmp_path):
    with pytest.raises(UserError, match="folder train/ in it, got"):
        reproduce_cifar.main(reproduce_cifar.Config(tmp_path, tmp_path / "out"))
    assert not runs.as_folder(tmp_path / "out").exists()


def test_the_full_size_is_a_preset_of_its_own(data, tmp_path):
    command = cli.find("reproduce-cifar")
    words = ["--preset", "full", "--data", str(data), "--workdir", str(tmp_path / "out")]
    config = cli.parse(command, [*words, "--fine-tunings", "lore@0.02"])
    lore = reproduce_cifar.training(config, "lore@0.02")
    assert (lore.method, lore.attack) == (LoreConfig(rho=0.02), "loss")
    assert (lore.num_images, lore.num_epochs) == (45_000, 5)
    certificates = reproduce_cifar.measured(config).certificates
    assert certificates.randomized.radii[1:] == (0.1, 0.25, 0.5, 0.75)
    assert (certificates.num_images, certificates.randomized.n) == (500, 100_000)
    quarter = cli.parse(command, ["--preset", "quarter", *words[2:]])
    assert quarter.fine_tunings == reproduce_cifar.PRESETS["full"].fine_tunings
    assert (4 * quarter.num_train, quarter.num_epochs) == (45_000, 5)
    smaller = quarter.benchmark.certificates
    assert smaller.randomized == dataclasses.replace(certificates.randomized, n=10_000)
    with pytest.raises(UserError, match="'fair'; did you mean 'fare'"):
        reproduce_cifar.training(config, "fair")
    with pytest.raises(UserError, match="lore@RHO with a number above 0, got 'lore@x'"):
        reproduce_cifar.training(config, "lore@x")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fine_tunings": ("targeted", "faer")}, "did you mean 'fare'"),
        ({"fine_tunings": ("targeted", "fare-noise"), "noise": -0.1}, "noise"),
        ({"fine_tunings": ("fare", "loss-noise")}, "got 'loss-noise'"),
    ],
)
def test_what_is_wrong_with_a_later_training_is_said_before_the_first(
    changes, message, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(Train, "run", lambda *_, **__: pytest.fail("it began to train"))
    with pytest.raises(UserError, match=message):
        reproduce_cifar.main(reproduce_cifar.Config(data, tmp_path / "out", **changes))
