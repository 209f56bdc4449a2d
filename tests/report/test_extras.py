"""What an extra brings is asked for in one line where it is missing, and imported by use only."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ur_jax.errors import MissingPackageError
from ur_jax.report import build, canvas, page
from ur_jax.runs import Row, Summary


def test_importing_brings_no_optional_package():
    code = (
        "import sys, ur_jax, ur_jax.cli, ur_jax.jobs, ur_jax.jobs.benchmark; "
        "import ur_jax.report.build, ur_jax.report.plots, ur_jax.report.terminal; "
        "print([n for n in ('matplotlib', 'jinja2', 'tensorboardX', 'torch', 'pandas') "
        "if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "package, use",
    [
        ("matplotlib", lambda: canvas.new_figure(1, 1, (1.0, 1.0))),
        ("jinja2", lambda: page.render(page.Page("", "", (), []))),
    ],
)
def test_a_missing_package_is_asked_for_by_its_extra(package, use, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=r'pip install "ur_jax\[report\]"') as raised:
        use()
    assert package in str(raised.value) and "\n" not in str(raised.value)


def test_the_table_is_written_before_the_page_is_missed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    folder = tmp_path / "net" / "knn"
    folder.mkdir(parents=True)
    Summary("knn", "", {}, (Row("knn_accuracy", 0.5, 0.4, 0.6, 9),)).write(folder)
    with pytest.raises(MissingPackageError, match="jinja2"):
        build.main(build.Config(tmp_path))
    assert len((tmp_path / "RESULTS.csv").read_text().splitlines()) == 2
    assert not (tmp_path / "report.html").exists()
