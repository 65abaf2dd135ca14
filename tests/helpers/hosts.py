"""Two hosts on one machine: network namespaces, and a cable between them that can be cut."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.needs import needs

_CLONE_NEWNET = 0x40000000
CABLE = "cable"  # the name of both its ends; of a host on a bridge, its own end
_ESTABLISHED, _LISTENING = "01", "0A"  # in /proc/net/tcp
_LIBC = ctypes.CDLL(None, use_errno=True)


class NoNamespacesError(RuntimeError):
    """This machine does not allow to make them; the message is its own."""


@contextmanager
def or_skip() -> Iterator[None]:
    """Skips the test if what is made within needs network namespaces, and there can be none."""
    try:
        yield
    except NoNamespacesError as error:
        pytest.skip(f"this machine allows no network namespaces: {error}")


@dataclass(frozen=True)
class Host:
    name: str
    address: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is on this host, and so are the threads and processes that it starts."""
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.name}") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def plug(self, *, is_in: bool) -> None:
        """The cable, at this host's end."""
        ip("-n", self.name, "link", "set", CABLE, "up" if is_in else "down")

    def processes(self) -> list[tuple[int, str]]:
        """Id and command line of each."""
        found = []
        for number in map(int, ip("netns", "pids", self.name).split()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                found.append((number, Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()))
        return found

    def listeners(self) -> list[int]:
        """TCP ports on which somebody listens."""
        return [port for port, _, state in self._sockets() if state == _LISTENING]

    def connections_to(self, port: int) -> int:
        """How many TCP connections go out to such a port."""
        return sum(remote == port and state == _ESTABLISHED for _, remote, state in self._sockets())

    def _sockets(self) -> list[tuple[int, int, str]]:
        """Own port, remote port and state of each."""
        with self.inside():
            lines = [line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]]
        own, remote = ([int(line[i].partition(":")[2], 16) for line in lines] for i in (1, 2))
        return list(zip(own, remote, (line[3] for line in lines), strict=True))


@needs("hosts")
@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """In the end nothing may run on them, and they are gone in any case.

    Raises:
        NoNamespacesError: says why not.
    """
    tag = secrets.token_hex(3)
    hosts = Host(f"tidewright-{tag}-0", "10.77.0.1"), Host(f"tidewright-{tag}-1", "10.77.0.2")
    try:
        try:
            for host in hosts:
                ip("netns", "add", host.name)
            ends = [("name", CABLE, "netns", host.name) for host in hosts]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for host in hosts:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
                ip("-n", host.name, "link", "set", "lo", "up")
                host.plug(is_in=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoNamespacesError(str(getattr(error, "stderr", "") or error).strip()) from None
        yield hosts
        deadline = time.monotonic() + 5
        while (left := [(host.processes(), host.listeners()) for host in hosts]) != [([], [])] * 2:
            assert time.monotonic() < deadline, f"left on the hosts: {left}"
            time.sleep(0.05)
    finally:
        for host in hosts:
            if host.name in namespaces():
                for number, _ in host.processes():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(number, signal.SIGKILL)
                ip("netns", "delete", host.name)
    assert not {host.name for host in hosts} & namespaces()


class Worker:
    """`tidewright worker`."""

    def __init__(self, host: Host, log: Path, rendezvous: str, model: str | Path, *more: str) -> None:
        self._log = log
        command = [sys.executable, "-c", "from tidewright.launch.cli import main; main()", "worker"]
        options = ["--rendezvous", rendezvous, "--model", str(model), *(more or ("--node-rank", "1"))]
        with host.inside(), log.open("wb") as file:
            self.process = subprocess.Popen([*command, *options], stdin=subprocess.DEVNULL, stderr=file)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_until(self, fits: Callable[[str], object], patience: float = 30.0) -> None:
        """What it has said so far fits."""
        deadline = time.monotonic() + patience
        while not fits(self.said):
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit status after this signal."""
        self.process.send_signal(number)
        return self.process.wait(10)


@contextmanager
def worker(host: Host, log: Path, rendezvous: str, model: str | Path, *more: str) -> Iterator[Worker]:
    started = Worker(host, log, rendezvous, model, *more)
    try:
        yield started
        if started.process.poll() is None:
            assert started.end() == 0
    finally:
        started.process.kill()
        started.process.wait()


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def namespaces() -> set[str]:
    folder = Path("/run/netns")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
