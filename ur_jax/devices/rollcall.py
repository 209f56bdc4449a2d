"""The roll call: the processes of a run find out who is there, before JAX is told.

JAX ends the process with a page of C++ where somebody does not come, or waits for minutes. So the
first process listens at the coordinator's address, the others give their number and the count that
they expect, a line each, and all get the same answer, `go` or what is wrong; then the address is
free again.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time

from ur_jax.devices.launchers import Launch
from ur_jax.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def roll_call(launch: Launch, seconds: float) -> None:
    """Returns once all processes of a launch are there.

    Args:
      launch: who this one is.
      seconds: how long to wait for the others.

    Raises:
      UserError: if some do not come in time, two have one number or count differently, or the
        address cannot be had or reached. All that are there get it.
    """
    host, port = address_of(launch)
    give_up = time.monotonic() + seconds
    if launch.process_id == 0:
        _call(launch, host, port, give_up, seconds)
    else:
        _answer(launch, host, port, give_up, seconds)


def address_of(launch: Launch) -> tuple[str, int]:
    """Host and port where the processes meet."""
    host, _, port = launch.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _call(launch: Launch, host: str, port: int, give_up: float, seconds: float) -> None:
    """The first process: waits for the others and tells them the result."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(host, port))
        except OSError as error:
            raise UserError(
                f"Port {port} of this machine, where the {launch.num_processes} processes were to "
                f"meet, cannot be had ({error.strerror or error}); pass another by --coordinator, "
                "or by JAX_COORDINATOR_ADDRESS."
            ) from error
        present: dict[int, socket.socket] = {}
        wrong = ""
        while len(present) < launch.num_processes - 1 and not wrong:
            server.settimeout(max(give_up - time.monotonic(), 0.01))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(10)
                word, *numbers = connection.recv(64).decode().split()
                number, count = map(int, numbers)
            except TimeoutError:
                missing = sorted({*range(1, launch.num_processes)} - {*present})
                shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                wrong = (
                    f"Of {launch.num_processes} processes, number {shown} did not come to "
                    f"{launch.coordinator} within {seconds:g} s; check that each was started, "
                    "with a number of its own."
                )
                continue
            except (OSError, ValueError):
                continue  # somebody else's connection
            if word != "ur_jax":
                continue
            if number in present or count != launch.num_processes or number == 0:
                wrong = (
                    f"Expected {launch.num_processes} processes with a number each, got another "
                    f"one that calls itself {number} of {count}; check --num-processes and "
                    "--process-id."
                )
            present.setdefault(number if number not in present else -1, connection)
        for connection in present.values():
            with contextlib.suppress(OSError):
                connection.sendall((wrong or "go").encode())
    if wrong:
        raise UserError(wrong)


def _answer(launch: Launch, host: str, port: int, give_up: float, seconds: float) -> None:
    """Another process: gives its number and waits for the result."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(f"ur_jax {launch.process_id} {launch.num_processes}".encode())
                connection.settimeout(max(give_up - time.monotonic(), 0) + 10)
                result = connection.recv(4096).decode()
                break
        except OSError as error:
            if time.monotonic() > give_up or error.errno in (errno.EACCES, errno.EPERM):
                raise UserError(
                    f"Process {launch.process_id} of {launch.num_processes} did not reach the "
                    f"first one at {launch.coordinator} within {seconds:g} s ({error}). Check "
                    "that it was started and that this machine reaches it, or name an address "
                    "that it does reach: --coordinator HOST:PORT."
                ) from error
        time.sleep(0.1)
    if result != "go":
        raise UserError(
            result or f"The first process ended at {launch.coordinator}; see its output."
        )


def _listen(host: str, port: int) -> socket.socket:
    """Listens: to this machine alone where the address is of that kind."""
    if host in LOOPBACK[:2]:
        return socket.create_server(("127.0.0.1", port), backlog=4096)
    if host in LOOPBACK or not socket.has_dualstack_ipv6():
        family = socket.AF_INET6 if host in LOOPBACK else socket.AF_INET
        return socket.create_server((host if host in LOOPBACK else "", port), family=family)
    return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
    )
