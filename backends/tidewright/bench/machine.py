"""What the benchmark has to know about the machine: its name, whether it is idle, memory, free ports."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import socket
import time
from pathlib import Path

import psutil

IDLE_PERCENT = 10.0  # of all cores


def wait_idle(timeout: float = 5.0) -> bool:
    """Until the cores are idle: OpenMP threads of the system that ran last spin for a while. False: they never were."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if psutil.cpu_percent(interval=0.2) < IDLE_PERCENT:
            return True
    return False


def description() -> dict[str, str | int]:
    return {"cpu": _cpu_name(), "cores": psutil.cpu_count() or 1, "python": platform.python_version()}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def server_memory(pid: int) -> dict[str, float]:
    """MiB of tritonserver and what it started (proportional set size), by what each process is."""
    sizes: dict[str, float] = {}
    for process in family(pid):
        name = process_name(process)
        sizes[name] = sizes.get(name, 0) + process.memory_full_info().pss / 2**20
    return sizes


_PORTS = range(10_000, 32_768)  # Linux gives those from 32768 on (net.ipv4.ip_local_port_range)
# Processes that start one after the other begin far apart (Fibonacci hashing, Knuth, TAOCP 3, 6.4).
_next_port = itertools.count(int(os.getpid() * (5**0.5 - 1) / 2 * len(_PORTS)) % len(_PORTS))


def free_ports(count: int) -> list[int]:
    """TCP ports of this machine that nobody listens on, never twice the same in one process.

    They are below those that the kernel gives to whoever wants any, or a connection could have one before it is used.
    """
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port = _PORTS[next(_next_port) % len(_PORTS)]
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def process_name(process: psutil.Process) -> str:
    """Which part of Tidewright, or of what tests it, a process is."""
    command = " ".join(process.cmdline())
    if "python_backend_stub" in command:
        return f"stub of {command.split('/1/model.py')[0].rpartition('/')[2]}"
    for part, name in _PARTS.items():
        if part in command:
            return name
    return "others"


_PARTS = {
    "tritonserver": "tritonserver",
    "tidewright_gateway": "gateway",
    "tidewright gateway": "gateway",
    "tidewright.engine": "engine",
    "locust": "locust",
    "tidewright serve": "serve",
    "loadtests": "loadtests",
}
