"""Processes of a server: `tidewright serve` as a user starts it, and its stubs and engines, which chaos tests kill."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from helpers.needs import needs
from helpers.triton import RunningServer
from tidewright.bench.machine import free_ports


@needs("chaos")
def child(pid: int, what: str) -> psutil.Process:
    """The oldest that lives: beside the engine that runs another stands by, and Triton leaves zombies of its stubs."""
    family = psutil.Process(pid).children(recursive=True)
    alive = [process for process in family if process.status() != psutil.STATUS_ZOMBIE]
    return min((p for p in alive if what in " ".join(p.cmdline())), key=psutil.Process.create_time)


@needs("chaos")
def stub_of(server: RunningServer, model: str) -> psutil.Process:
    assert server.triton.pid is not None
    return child(server.triton.pid, f"/{model}/")


def processes(server: RunningServer) -> set[int]:
    """Triton's pid, and those of its stubs, their engines and the engines that stand by; not of any that has ended."""
    triton = psutil.Process(server.triton.pid)
    living = set()
    for process in (triton, *triton.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.add(process.pid)
    return living


def shared_memory() -> set[str]:
    """Names of the regions, but for those of servers beside these tests that still run."""
    found = {path.name: re.match(r"tidewright_(\d+)_", path.name) for path in Path("/dev/shm").iterdir()}
    ours = {process.pid for process in psutil.Process().children(recursive=True)} | {os.getpid()}
    others = set(psutil.pids()) - ours
    return {name for name, match in found.items() if not match or int(match[1]) not in others}


@needs("server")
class Serve:
    """`tidewright serve` as a user starts it."""

    def __init__(self, *options: str) -> None:
        self.http, self.grpc, self.metrics, self.gateway = free_ports(4)
        ports = [
            f"--http-port={self.http}",
            f"--grpc-port={self.grpc}",
            f"--metrics-port={self.metrics}",
            f"--gateway-port={self.gateway}",
        ]
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("tidewright"), "serve", *ports, *options],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.log = ""
        self.family: list[psutil.Process] = []

    def wait_ready(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if "Ctrl-C stops" in line or '"event":"ready"' in line:
                self.family = psutil.Process(self.process.pid).children(recursive=True)
                return
        raise AssertionError(f"serve ended: {self.log}")

    def wait(self, timeout: float) -> int:
        _, rest = self.process.communicate(timeout=timeout)
        self.log += rest
        return self.process.returncode

    def assert_nothing_left(self) -> None:
        _, alive = psutil.wait_procs(self.family, timeout=30)
        assert not alive
        for port in (self.http, self.grpc, self.metrics, self.gateway):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0
