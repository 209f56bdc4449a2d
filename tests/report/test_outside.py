"""A job and a metric from one file outside the package: on the command line, in the table printed,
in RESULTS.csv and in the page, with a curve."""

from __future__ import annotations

import csv
import sys

import jax
import pytest
import tiny_encoder

from ur_jax import cli
from ur_jax.jobs import JOBS, progress
from ur_jax.metrics import METRICS

FILE = '''
"""Brightness: how bright images are, for a test."""

import dataclasses

import numpy as np

from ur_jax import runs
from ur_jax.jobs import Curve, Job, parts, register
from ur_jax.metrics import METRICS, Column, Metric, summarise

METRICS.register(
    "dark_share",
    Metric(
        "proportion", "low", "Share of images that are dark.",
        columns=(Column("brightness", "share of dark images"),),
    ),
)


@register("brightness")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Brightness(Job):
    """Looks how bright images are."""

    threshold: float = 0.5
    """Below it an image is dark."""

    def compute(self, session):
        stage = parts.Stage("means", "means", (np.arange(len(self.source())),), 8)
        parts.run_stage(
            session, stage, self.source(), lambda batch: {"mean": batch.images.mean((1, 2, 3))},
            input_size=self.model.input_size, preparation=self.model.preparation,
        )

    def merge(self, session):
        means = session.run.read_parts("means")["mean"]
        runs.write_table(session.run.path / "means.parquet", {"mean": means})
        dark = summarise("dark_share", means < self.threshold)
        return self.summary([runs.Row.of("dark_share", dark)])

    @classmethod
    def curves(cls, folder, summary, siblings):
        means = np.sort(runs.read_table(folder / "means.parquet")["mean"])
        share = np.arange(1, len(means) + 1) / len(means)
        yield Curve("brightness", "all", "mean", "share", "Dark images.", means, share, kind="step")
'''


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What the commands printed, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "brightness_job.py").write_text(FILE)
    tiny_encoder.save_images(folder / "images", 12)
    out, workdir = folder / "work" / "demo" / "brightness", str(folder / "work")
    flags = ["--encoder", "demo", "--images", f"folder:{folder / 'images'}", "--threshold", "0.4"]
    plugin = ["--plugin", str(folder / "brightness_job.py")]
    commands = {
        "help": [*plugin, "--help"],
        "job": ["brightness", *plugin, *flags, "--out", str(out)],
        "report": ["report", workdir, *plugin],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.config, "update", lambda *_: None)
        patch.setattr(progress.console, "_width", 80)
        patch.setattr(cli, "_SCRIPTS", {"report": cli._SCRIPTS["report"]})  # usage imports all
        # Both registries are as before once the block is left.
        with (
            JOBS.replaced("evaluate", JOBS["evaluate"]),
            METRICS.replaced("certified", METRICS["certified"]),
        ):
            printed = {name: _run(words) for name, words in commands.items()}
            assert [status for status, _ in printed.values()] == [0, 0, 0], printed["job"][1]
        sys.modules.pop("brightness_job")
        printed["page"] = (0, (folder / "work" / "report.html").read_text())
        printed["without"] = _run(commands["report"][:2])
    return folder, printed


def _run(words):
    """Exit status of a command, and what it printed."""
    with progress.console.capture() as capture:
        status = cli.main(words)
    return status, capture.get()


def test_it_is_on_the_command_line_and_in_the_table(done):
    _, printed = done
    status, text = printed["help"]
    assert status == 0
    assert "  brightness        Brightness: how bright images are, for a test." in text
    status, text = printed["job"]
    assert status == 0
    [row] = [line.split() for line in text.splitlines() if line.strip().startswith("dark_share")]
    assert row == ["dark_share", "0.500", "0.211", "to", "0.789", "12", "low"]


def test_it_is_in_the_page(done):
    folder, printed = done
    assert printed["report"][0] == 0 and "1 numbers of 1 stages" in printed["report"][1]
    with open(folder / "work" / "RESULTS.csv", newline="") as file:
        [line] = csv.DictReader(file)
    assert line["metric"] == "dark_share" and float(line["value"]) == 0.5
    _, text = printed["page"]
    assert 'title="Share of images that are dark."' in text and "share of dark images" in text
    assert text.count("<svg") == 1 and (folder / "work" / "figures" / "brightness.png").exists()


def test_without_its_file_the_number_stays_and_the_report_says_what_to_do(done):
    _, printed = done
    status, text = printed["without"]
    assert status == 1 and "1 numbers of 1 stages" in text
    assert "no job 'brightness'" in text and "--plugin" in text
