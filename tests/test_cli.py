"""The command line, and how a command ends: signals, disks, memory, other hosts; in real processes
where signals are sent."""

from __future__ import annotations

import errno
import signal
import subprocess
import time

import fuzz_flags
import jax
import processes
import pytest
import tiny_encoder

from ur_jax import _begin, cli, endings
from ur_jax.devices.hosts import OtherHostError
from ur_jax.errors import Stop, UserError
from ur_jax.jobs import progress

LONG = "half" * 40
"""Longer than a line of the parser's box."""

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A folder with an encoder and images."""
    place = tmp_path_factory.mktemp("cli")
    with tiny_encoder.stands_for_demo():
        processes.prepare(place)
    return place


def ends(words, capsys):
    """Exit status and output of a command in this process."""
    with tiny_encoder.stands_for_demo():
        status = cli.run(words[0], words[1:])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_a_signal_ends_in_one_line_that_says_how_to_go_on(at, tmp_path):
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # also under nohup
    kinds = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "asked to stop")}
    started, sooner = {}, tmp_path / "sooner.py"
    sooner.write_text("from ur_jax import endings\nendings._SECONDS = 1.0\n")
    for number in kinds:
        words = processes.evaluate(at, tmp_path / number.name, "--read-at", "1", "5000000")
        words += ("--plugin", str(sooner))
        started[number] = processes.start(*processes.COMMAND, *words, preexec_fn=default)
    give_up = time.monotonic() + 120
    is_ready = lambda: len(list(tmp_path.glob("*/parts/clean/000002.npz"))) == len(kinds)
    while not is_ready() and time.monotonic() < give_up:
        time.sleep(0.1)
    time.sleep(2)  # by now JAX computes steps of an attack, for hours
    for number, process in started.items():
        process.send_signal(number)
    for number, (status, said) in kinds.items():
        code, output = processes.finish(started[number], timeout=60)
        assert code == status and "Traceback" not in output, output
        assert [line for line in output.splitlines() if said in line] == [
            f"{said}. What is finished is kept in {tmp_path}/{number.name}; "
            "repeat the command to go on."
        ]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 200 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place])
    if made.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place])


def test_a_disk_that_is_full_or_read_only(at, small_disk, capsys):
    out = small_disk / "out"
    fill = small_disk / "fill"
    fill.write_bytes(bytes(150 * 1024))
    status, output = ends(processes.evaluate(at, out), capsys)
    assert status == 2 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if "error:" in line]
    assert f"{out}/" in line and "no space left on device; make room" in line
    assert f"What is finished is kept in {out}; repeat the command" in line

    fill.unlink()
    assert not list(out.rglob("*.tmp"))  # nothing of what failed takes its place
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, output = ends(processes.evaluate(at, small_disk / "other"), capsys)
    assert status == 2 and "--out where you may write" in output and "Traceback" not in output


def test_out_under_a_file(at, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        status, output = ends(processes.evaluate(at, out), capsys)
        assert status == 2 and str(tmp_path / "file") in output and "Traceback" not in output
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error, status, shown",
    [
        (UserError("Expected 1, got 2."), 2, "error: Expected 1, got 2."),
        (KeyboardInterrupt(), 130, "interrupted. What is finished is kept in runs/x; repeat"),
        (Stop(), 143, "asked to stop. What is finished is kept in runs/x; repeat"),
        (OSError(errno.EDQUOT, "", "runs/x/a"), 2, "runs/x/a: disk quota exceeded; make room"),
        (OSError(errno.ENOSPC, "of Arrow"), 2, "runs/x: no space left on device"),
        (PermissionError(errno.EACCES, "", "a"), 2, "a: permission denied; name a folder"),
        (OSError(errno.ESTALE, "", "a"), 2, "see that it is back"),
        (OSError(errno.EMFILE, "", "a"), 2, "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "fork"), 2, "fewer --num-workers"),
        (RuntimeError("can't start new thread"), 2, "fewer --num-workers"),
        (MemoryError("Unable to allocate 3 GiB"), 2, "Unable to allocate 3 GiB"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nX"),
            2,
            "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.); "
            "give a smaller --batch-size (now 64), or bfloat16.",
        ),
        (OtherHostError("Host 1 failed; see its output."), 1, "error: Host 1 failed"),
        (BrokenPipeError(errno.EPIPE, ""), 0, ""),  # `| head`: nobody reads any more
    ],
)
def test_the_line_of_each_error(error, status, shown):
    words = ["--encoder", "demo", "--images", "demo", "--out", "runs/x"]
    flags = cli.parse(cli.find("evaluate"), words)
    end = endings.end_of(error, "evaluate", flags)
    assert end.status == status and shown in end.line and "\n" not in end.line


def test_a_fault_keeps_its_traceback():
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "", "a"), TypeError("x")):
        assert endings.end_of(error) is None
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), endings.Ending():
        raise KeyError("ours")
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_bar_ends_before_the_line(monkeypatch, capsys):
    console = progress.Console(force_terminal=True, width=60)
    monkeypatch.setattr(progress, "console", console)
    with endings.Ending() as ending:
        bar = iter(progress.watched(range(3), "attack", 3))
        next(bar)
        raise Stop
    assert ending.status == 143
    output = capsys.readouterr().out
    # The cursor, hidden by the bar, is shown again, and then nothing is drawn over the line.
    assert "asked to stop" in output.rpartition("\x1b[?25h")[2]


def test_of_two_hosts_one_that_fails_ends_both(at, tmp_path):
    plugin = tmp_path / "full_on_one.py"
    plugin.write_text(
        "import errno, jax\n"
        "from ur_jax.runs import Run\n"
        "write_part = Run.write_part\n"
        "def full(self, stage, number, arrays):\n"
        "    if jax.process_index() == 1 and number > 0:\n"
        "        raise OSError(errno.ENOSPC, 'full', '/mnt/part')\n"
        "    write_part(self, stage, number, arrays)\n"
        "Run.write_part = full\n"
    )
    out = tmp_path / "out"
    meet = ("--coordinator", f"localhost:{processes.free_port()}", "--num-processes", "2")
    words = (*processes.COMMAND, *processes.evaluate(at, out, "--plugin", str(plugin), *meet))
    hosts = [processes.start(*words, "--process-id", str(i)) for i in range(2)]
    (first, first_said), (second, second_said) = map(processes.finish, hosts)
    assert (first, second) == (1, 2), first_said + second_said
    assert "host 0: error: Host 1 failed; see its output." in first_said
    assert "host 1: error: /mnt/part: no space left on device" in second_said
    assert "Traceback" not in first_said + second_said


def test_the_usage_tells_commands_flags_and_statuses(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    for word in ("evaluate", "benchmark", "--plugin", "--coordinator", "143", "exit status"):
        assert word in said
    assert cli.main(["evalute"]) == 2
    assert "did you mean 'evaluate'" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    "words", [["--num-processes", "2"], ["--num-processes", "x"], ["--plugin"],
              ["--coordinator", "a", "--num-processes", "2", "--process-id", "0"],
              ["--plugin", "/nowhere.py"]],
)  # fmt: skip
def test_flags_of_every_command_are_checked(words, capsys):
    assert cli.run("evaluate", words) == 2
    said = capsys.readouterr().out
    assert "error:" in said and "Traceback" not in said


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cli.keep_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ur_jax")
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        cli.keep_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_sample_of_bad_flags_is_refused_in_one_line_each(tmp_path):
    fuzz_flags.prepare(tmp_path)
    with tiny_encoder.stands_for_demo(), fuzz_flags.nothing_computes():
        ended = {case: fuzz_flags.outcome(case) for case in fuzz_flags.cases(tmp_path, 60)}
    wrong = {" ".join((case.command, *case.words)): how for case, how in ended.items()}
    assert {words: how for words, how in wrong.items() if how != "refused"} == {}


@pytest.mark.parametrize(
    "words, line",
    [
        (("--eps", "-1"), "Expected eps > 0 and <= 1, in pixel units of [0,1], got -1.0."),
        (("--num-imagess", "3"), "Unrecognized options: --num-imagess, 3; did you mean --num-im"),
        (("--num-images", "x"), "--num-images: invalid literal for int() with base 10: 'x'."),
        (("--dtype", LONG), f"Unknown dtype '{LONG}'. Expected one of: bfloat16, float32."),
        (("--rule", "nope"), "Unknown step rule 'nope'. Expected one of: "),
        (("--seed",), "Missing value for argument '--seed'."),
        (("--preset",), "Expected one of paper, quick, strong, fast behind --preset, got none."),
    ],
)
def test_what_the_parser_refuses_is_one_line_too(at, tmp_path, capsys, words, line):
    status, output = ends(processes.evaluate(at, tmp_path / "out", *words), capsys)
    assert status == 2 and not (tmp_path / "out").exists()
    (told,) = output.splitlines()
    assert told.startswith(f"error: {line}"), told


def test_an_interrupted_import_is_one_line_and_others_errors_are_not(capsys, monkeypatch):
    def raised(file, error):
        try:
            exec(compile("raise error", file, "exec"), {"error": error})
        except BaseException as caught:
            return type(caught), caught, caught.__traceback__

    monkeypatch.setattr(_begin, "_before", lambda *_: print("traceback"))
    ours = _begin.__file__.replace("_begin", "anything")
    lost = ImportError("an extension")
    lost.__context__ = KeyboardInterrupt()
    for file, error, said in (
        (ours, KeyboardInterrupt(), "interrupted. Nothing was begun.\n"),
        (ours, lost, "interrupted. Nothing was begun.\n"),
        (ours, ImportError("x"), "traceback\n"),
        ("users.py", KeyboardInterrupt(), "traceback\n"),
    ):
        _begin._told(*raised(file, error))
        assert "".join(capsys.readouterr()) == said
