"""Which process of how many this is, as the program that started it tells: Open MPI, MPICH, SLURM.

JAX wants HOST:PORT of the first process, the number of processes and this one's own number. Every
launcher tells the two numbers; the address is read or derived here:

- Open MPI: its job names the machine of `mpirun`, where the first process normally runs too.
- MPICH, Intel MPI (Hydra): the first process picks a free port and tells it to the others over the
  PMI-1 connection that every process is given.
- SLURM: the first node of the step.

Another launcher that sets numbers known here is refused, as its processes would each do everything.
A TPU pod is found by JAX itself, see `hosts.join`.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from ur_jax.errors import UserError

# (how many processes, which one this is): launchers that are recognised only to be refused.
_OTHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("PMIX_SIZE", "PMIX_RANK"),  # PMIx tells the rank only: any but the first gives itself away
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"),
    ("WORLD_SIZE", "RANK"),
)


class Launch(NamedTuple):
    """One process of several.

    Attributes:
      coordinator: HOST:PORT of the first process, where all meet.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      local_id: which one of this machine's processes, if it has several: it takes the accelerator
        of that number. None: it takes all of the machine's.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_id: int | None = None


_ALONE = Launch("", 1, 0)


def explicit(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Launch | None:
    """What the flags --coordinator, --num-processes and --process-id say; None if none is given.

    Raises:
      UserError: if some are missing or cannot be.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        return None
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            "Expected --coordinator HOST:PORT, --num-processes N and --process-id I together; "
            f"got {', '.join(map(str, given))} of them (None: not given)."
        )
    host, _, port = coordinator.rpartition(":")
    if not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"Expected --coordinator HOST:PORT, got {coordinator!r}: the machine of process 0 and "
            "a port that is free there, such as node1:12345."
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            "Expected --num-processes N >= 1 and --process-id from 0 to N - 1, got "
            f"{num_processes} and {process_id}."
        )
    return Launch(coordinator, num_processes, process_id)


def found(environment: Mapping[str, str] | None = None) -> Launch | None:
    """What the environment says; None for a process on its own.

    JAX_COORDINATOR_ADDRESS takes precedence over the address that is derived.

    Raises:
      UserError: for one of several processes of a launcher that does not tell enough; it says
        which flags to pass.
    """
    env = os.environ if environment is None else environment
    # In this order: mpirun inside a SLURM job starts its helpers by srun, whose variables the
    # processes inherit.
    for launcher in (_open_mpi, _hydra, _slurm):
        if (launch := launcher(env)) is not None:
            return None if launch == _ALONE else launch
    for size, rank in _OTHERS:
        if _number(env, size, 1) > 1 or _number(env, rank, 0) > 0:
            raise _unknown(env, f"{size if size in env else rank} is set", rank, size)
    return None


def _open_mpi(env: Mapping[str, str]) -> Launch | None:
    """Open MPI, 4 (which names the machine of mpirun in a URI) and 5 (in the name of the job)."""
    num_processes = _number(env, "OMPI_COMM_WORLD_SIZE", 0)
    if num_processes < 2:
        return _ALONE if num_processes else None
    process_id = _number(env, "OMPI_COMM_WORLD_RANK", 0)
    num_local = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
    local_id = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0) if num_local > 1 else None
    uri, job = env.get("OMPI_MCA_orte_hnp_uri", ""), env.get("PMIX_NAMESPACE", "")
    is_there = True  # the first process, on that host
    if num_local == num_processes:
        host = "127.0.0.1"
    elif known := re.search(r"tcp://([^,:]+)", uri):
        host = known[1]
        is_there = env.get("OMPI_MCA_orte_local_daemon_uri", uri) == uri
    elif known := re.fullmatch(r"prte(?:run)?-(.+)-\d+@\d+", job):
        host = known[1]
        is_there = env.get("PMIX_HOSTNAME", host) == host
    else:
        host = ""
    known = env.get("JAX_COORDINATOR_ADDRESS")
    if known is None and num_local != num_processes:
        size, rank = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
        if not host:
            raise _unknown(env, "Open MPI does not say where its first process is", rank, size)
        if process_id == 0 and not is_there:
            raise _unknown(env, f"the first process is not on mpirun's machine {host}", rank, size)
    address = known or f"{host}:{_port(uri.partition(';')[0] + job)}"
    return Launch(address, num_processes, process_id, local_id)


def _hydra(env: Mapping[str, str]) -> Launch | None:
    """MPICH and Intel MPI, whose processes are given a connection to ask over."""
    num_processes = _number(env, "PMI_SIZE", 0)
    if num_processes < 2 or "PMI_FD" not in env or _is_of_srun(env, num_processes):
        return _ALONE if num_processes == 1 else None
    process_id = _number(env, "PMI_RANK", 0)
    num_local = _number(env, "MPI_LOCALNRANKS", 1)
    local_id = _number(env, "MPI_LOCALRANKID", 0) if num_local > 1 else None
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        host = "127.0.0.1" if num_local == num_processes else socket.gethostname()
        try:
            address = _agree(int(env["PMI_FD"]), process_id, host)
        except (OSError, KeyError, ValueError) as error:
            reason = f"the launcher's connection PMI_FD does not answer ({error!r})"
            raise _unknown(env, reason, "PMI_RANK", "PMI_SIZE") from error
    return Launch(address, num_processes, process_id, local_id)


def _agree(descriptor: int, process_id: int, host: str) -> str:
    """Process 0 picks a port of its host; all return the same HOST:PORT.

    A session of PMI-1, a line per question and per answer; it ends with `finalize`, without which
    the launcher would take the end of a process for a crash.
    """
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.settimeout(300)  # others may still be importing
        lines = connection.makefile("rw")

        def ask(text: str) -> dict[str, str]:
            lines.write(f"cmd={text}\n")
            lines.flush()
            answer = dict(pair.split("=", 1) for pair in lines.readline().split() if "=" in pair)
            if answer.get("rc", "0") != "0" or "cmd" not in answer:
                raise ValueError(f"answer {answer} to {text!r}")
            return answer

        ask("init pmi_version=1 pmi_subversion=1")
        space = ask("get_my_kvsname")["kvsname"]
        if process_id == 0:
            with socket.socket() as free:
                free.bind(("", 0))
                address = f"{host}:{free.getsockname()[1]}"
            ask(f"put kvsname={space} key=ur_jax value={address}")
        ask("barrier_in")
        address = ask(f"get kvsname={space} key=ur_jax")["value"]
        ask("finalize")
    return address


def _slurm(env: Mapping[str, str]) -> Launch | None:
    """`srun`; inside `sbatch` but without `srun` there is one process."""
    num_processes = _number(env, "SLURM_STEP_NUM_TASKS", 0)
    if num_processes < 2 or "SLURM_PROCID" not in env:
        return _ALONE if num_processes else None
    num_nodes = _number(env, "SLURM_STEP_NUM_NODES", 1)
    is_alone = num_processes == num_nodes  # on its machine
    local_id = None if is_alone else _number(env, "SLURM_LOCALID", 0)
    nodes = env.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if first is None:
        reason = "SLURM_STEP_NODELIST is empty"
        raise _unknown(env, reason, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    host = "127.0.0.1" if num_nodes == 1 else first[1] + (first[2] or "")
    port = _port(f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}")
    address = env.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{port}"
    return Launch(address, num_processes, _number(env, "SLURM_PROCID", 0), local_id)


def _is_of_srun(env: Mapping[str, str], num_processes: int) -> bool:
    """Whether PMI's variables are those of `srun --mpi=pmi2`."""
    return (
        _number(env, "SLURM_STEP_NUM_TASKS", 0) == num_processes
        and env.get("SLURM_PROCID") == env.get("PMI_RANK")
        and "HYDI_CONTROL_FD" not in env
    )


def _port(job: str) -> int:
    """A port for a job, the same in all of its processes, above those that Linux gives out."""
    return 61440 + zlib.crc32(job.encode()) % 4096


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    """A number of the environment; the default for what is none."""
    text = env.get(name, "")
    return int(text) if text.isdecimal() else default


def _unknown(env: Mapping[str, str], reason: str, rank: str, size: str) -> UserError:
    """The error for one of several processes that cannot find the others."""
    number = env.get(size, "N")
    return UserError(
        f"This looks like one of {number if size in env else 'several'} processes ({reason}), but "
        "how they meet is not known. Pass --coordinator HOST:PORT (of process 0) --num-processes "
        f"{number} --process-id I to each (here I is {env.get(rank, 'its number')}; in a shell "
        f'"${rank}"), or start one process without a launcher.'
    )
