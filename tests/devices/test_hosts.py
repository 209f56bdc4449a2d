"""Two processes on one machine: the same table as one, also after one of them was killed."""

from __future__ import annotations

import json
import subprocess
import sys

import host_worker
import jax
import numpy as np
import processes
import pytest

from ur_jax.devices import hosts


def start(folder, workdir, die_after=0):
    """Starts two processes; the second one dies after so many parts."""
    port, started = processes.free_port(), []
    for host, parts in enumerate((0, die_after)):
        arguments = map(str, (folder, folder / workdir, host, 2, port, parts))
        log = open(folder / f"{workdir}-{host}.log", "a")
        started.append(
            subprocess.Popen(
                [sys.executable, host_worker.__file__, *arguments], stdout=log, stderr=log,
                env=processes.environment(),
            )
        )  # fmt: skip
    return started


def finish(folder, started):
    codes = [process.wait(timeout=300) for process in started]
    logs = "".join(path.read_text()[-3000:] for path in folder.glob("*.log"))
    assert codes == [0] * len(codes), logs


def test_two_processes_one_of_them_killed_and_started_again_equal_one(tmp_path, monkeypatch):
    folder = tmp_path
    processes.prepare(folder)
    with monkeypatch.context() as patch:  # as many devices as each of the two has
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:4])
        assert host_worker.work(folder, folder / "one") == 0
    table = (folder / "one" / "RESULTS.csv").read_bytes()
    assert table.count(b"\n") > 40

    survivor, victim = start(folder, "two", die_after=4)
    assert victim.wait(timeout=300) == 9
    survivor.kill()
    survivor.wait()
    assert not (folder / "two" / "RESULTS.csv").exists()
    parts = folder / "two" / "tiny"
    assert list(parts.glob("*/parts/*/*.npz")) or list(parts.glob("*/*/parts/*/*.npz"))
    finish(folder, start(folder, "two"))
    assert (folder / "two" / "RESULTS.csv").read_bytes() == table
    record = json.loads((parts / "breakaway.json").read_text())
    assert record["finished"] and record["hosts"] == 2
    # Where a batch is divided over both, sums are taken in another order.
    one, *two = (dict(np.load(path)) for path in sorted(folder.glob("*/streamed-*.npz")))
    assert len(two) == 2 and one["loss"].shape == (2,)
    for name, value in one.items():
        np.testing.assert_array_equal(two[0][name], two[1][name])
        np.testing.assert_allclose(two[0][name], value, rtol=1e-5, atol=1e-6)
    # Both took part: a host names its certificates after itself.
    certificates = parts / "certified-divergence" / "parts"
    assert {path.name for path in certificates.glob("certificates-*")} == {
        "certificates-0",
        "certificates-1",
    }


def test_one_host_waits_for_nobody_and_raises_its_own_error(monkeypatch):
    assert hosts.is_first() and hosts.on_all_hosts(True).tolist() == [True]
    with pytest.raises(KeyError, match="mine"), hosts.before_merge():
        raise KeyError("mine")
    # Of two hosts the other one failed.
    monkeypatch.setattr(hosts, "on_all_hosts", lambda value: [value, True])
    with pytest.raises(RuntimeError, match="Host 1 failed"), hosts.before_merge():
        pass


def test_a_tpu_is_joined_unless_this_process_keeps_to_the_cpu(monkeypatch):
    joined = []
    monkeypatch.setattr(hosts.launchers, "found", lambda: None)
    monkeypatch.setattr(hosts.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda: joined.append(True))
    hosts.join()  # conftest.py sets jax_platforms
    assert not joined
    monkeypatch.setattr(hosts, "_has_tpu", lambda: True)
    hosts.join()
    assert joined
