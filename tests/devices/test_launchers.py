"""Who a process is of how many, by each launcher's environment and by the launchers themselves."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading

import processes
import pytest
import tiny_encoder

from ur_jax import cli
from ur_jax.devices import hosts, launchers
from ur_jax.devices.launchers import Launch
from ur_jax.devices.rollcall import roll_call
from ur_jax.errors import UserError

OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "734724097", "PMIX_RANK": "2",
    "OMPI_MCA_orte_hnp_uri": "734724096.0;tcp://10.96.0.1,10.148.0.1:33941;tcp6://[fd00::2]:5709",
}  # fmt: skip
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-login-1-18253@1",
    "PMIX_RANK": "1", "PMIX_HOSTNAME": "login-1",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "gpu[007-008,11],b1",
}  # fmt: skip


def host(environment):
    launch = launchers.found(environment)
    name, _, port = launch.coordinator.rpartition(":")
    assert 61440 <= int(port) < 65536
    return name, *launch[1:]


def test_each_launcher_says_who_this_is():
    assert host(OPEN_MPI_4) == ("10.96.0.1", 4, 2, 0)
    assert host(OPEN_MPI_5) == ("login-1", 4, 1, 1)
    on_one = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert host(OPEN_MPI_4 | on_one)[0] == host(OPEN_MPI_5 | on_one)[0] == "127.0.0.1"
    assert host(SRUN) == ("gpu007", 6, 5, 1)
    # One process on each node takes all of its accelerators.
    assert host(SRUN | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0"}) == ("gpu007", 3, 0, None)
    assert host(SRUN | {"SLURM_STEP_NODELIST": "n1,n2"})[0] == "n1"
    # All of a job meet at one port, two jobs at two.
    port = lambda env: launchers.found(env).coordinator.rpartition(":")[2]
    assert port(OPEN_MPI_4) == port(OPEN_MPI_4 | {"OMPI_COMM_WORLD_RANK": "3"})
    assert port(SRUN) != port(SRUN | {"SLURM_STEP_ID": "1"})
    # mpirun inside a SLURM job: the helper that it started by srun is no process of ours.
    assert host(SRUN | OPEN_MPI_5) == host(OPEN_MPI_5)
    # srun --mpi=pmi2
    pmi = {"PMI_SIZE": "6", "PMI_RANK": "5", "PMI_FD": "9"}
    assert host(SRUN | pmi) == host(SRUN)
    there = "node9:1234"
    assert launchers.found(OPEN_MPI_5 | {"JAX_COORDINATOR_ADDRESS": there}).coordinator == there


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # sbatch without srun
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0", "PMI_FD": "6"},
        {"WORLD_SIZE": "1", "RANK": "0"},
    ],
)
def test_a_process_on_its_own(environment):
    assert launchers.found(environment) is None


@pytest.mark.parametrize(
    "environment, shown",
    [
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, '--num-processes 2 .*"\\$PMI_RANK"'),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "PMI_FD": "999"}, "PMI_FD does not answer"),
        ({"PMIX_RANK": "1"}, "several processes"),
        ({"MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_RANK": "3"}, "here I is 3"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "one of 4 processes"),
        ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "0"}, "FLUX_JOB_SIZE"),
        (
            {k: v for k, v in OPEN_MPI_5.items() if k != "PMIX_NAMESPACE"},
            "does not say where its first",
        ),
        (
            OPEN_MPI_5 | {"OMPI_COMM_WORLD_RANK": "0", "PMIX_HOSTNAME": "node7"},
            "not on mpirun's machine login-1",
        ),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST"),
    ],
)
def test_one_of_several_is_never_taken_for_one_on_its_own(environment, shown):
    with pytest.raises(UserError, match=f"{shown}") as refused:
        launchers.found(environment)
    assert "--coordinator HOST:PORT" in str(refused.value) and "\n" not in str(refused.value)


def test_the_flags_go_together():
    assert launchers.explicit(None, None, None) is None
    assert launchers.explicit("a:1", 2, 1) == Launch("a:1", 2, 1)
    for bad in (("a:1", None, 0), (None, 2, 0), ("a", 2, 0), (":5", 2, 0), ("a:x", 2, 0),
                ("a:1", 0, 0), ("a:1", 2, 2), ("a:1", 2, -1), ("a:99999", 2, 0)):  # fmt: skip
        with pytest.raises(UserError, match="--coordinator|--num-processes"):
            launchers.explicit(*bad)


@pytest.mark.parametrize(
    "started, wrong",
    [
        ([(3, 0), (3, 1), (3, 2)], None),
        ([(3, 0), (3, 1)], "number 2 did not come"),
        ([(2, 1)], "did not reach the first one"),
        ([(3, 0), (3, 1), (3, 1)], "calls itself 1 of 3"),
        ([(2, 0), (3, 1)], "calls itself 1 of 3"),
    ],
)
def test_the_roll_call_ends_in_the_same_way_for_all(started, wrong):
    port, ended = processes.free_port(), []

    def attend(num_processes, process_id):
        try:
            roll_call(Launch(f"127.0.0.1:{port}", num_processes, process_id), 1.5)
            ended.append(None)
        except UserError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=attend, args=process) for process in started]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == len(started)
    assert all(wrong in text if wrong else text is None for text in ended), ended


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} .* cannot be had .*--coordinator"):
            roll_call(Launch(f"127.0.0.1:{port}", 2, 0), 1)


def launcher(kind):
    """The command of a launcher, if it is installed, in the system or beside Python."""
    path = os.pathsep.join((os.environ["PATH"], str(pathlib.Path(sys.executable).parent)))
    for name in ("mpirun.openmpi", "mpirun", "mpiexec.openmpi", "mpiexec.hydra"):
        for folder in path.split(os.pathsep):
            if (found := shutil.which(name, path=folder)) is None:
                continue
            said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            if kind in said or (kind == "HYDRA" and "hydra" in said.lower()):
                more = () if kind == "HYDRA" else ("--allow-run-as-root", "--oversubscribe")
                return (found, *more)
    return None


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with an encoder and images, and the summary of one process."""
    folder = tmp_path_factory.mktemp("launched")
    with tiny_encoder.stands_for_demo():
        processes.prepare(folder)
        name, *words = processes.knn(folder, folder / "one")
        assert cli.run(name, words) == 0
    return folder, json.loads((folder / "one" / "summary.json").read_text())["rows"]


@pytest.mark.parametrize("kind", ["(Open MPI) 4", "(Open MPI) 5", "HYDRA"])
def test_two_processes_of_a_real_launcher_make_the_table_of_one(kind, table):
    folder, rows = table
    command = launcher(kind)
    if command is None:
        pytest.skip(f"no mpirun of {kind} is installed")
    words = (*processes.COMMAND, *processes.knn(folder, folder / kind))
    code, output = processes.finish(processes.start(*command, "-n", "2", *words))
    assert code == 0, output
    assert json.loads((folder / kind / "summary.json").read_text())["rows"] == rows
    assert output.count("Results in") == 1  # only the first one speaks


def test_a_machine_with_a_tpu_that_does_not_know_its_pod(monkeypatch):
    monkeypatch.setattr(hosts, "_has_tpu", lambda: True)
    monkeypatch.setattr(hosts.launchers, "found", lambda: None)

    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="has a TPU.*--coordinator"):
        hosts.join()
