"""The server under test, if the user names none: `tidewright serve` on free ports, with the embedded model."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from tidewright.bench.machine import free_ports

START_PATIENCE = 300.0  # seconds: the first start compiles kernels and prepares the model
STOP_PATIENCE = 60.0


class ServerError(Exception):
    """It did not start; the message has its last words."""


class Command:
    """`tidewright ARGUMENTS`, in a session of its own: a Ctrl-C at the terminal is for the load test."""

    def __init__(self, arguments: Sequence[str], log: Path | None = None) -> None:
        """`log`: where its words go; nowhere else can they be read once it has ended."""
        self._log = log.open("w+") if log else tempfile.TemporaryFile("w+")  # noqa: SIM115 - for as long as it runs
        program = str(Path(sys.executable).with_name("tidewright"))
        self.process = subprocess.Popen(
            [program, *arguments], stderr=self._log, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def wait_for(self, url: str) -> None:
        """Until it answers with 200.

        Raises:
            ServerError: it has ended, or does not answer in time.
        """
        deadline = time.monotonic() + START_PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.2)
        raise ServerError(f"{' '.join(map(str, self.process.args[1:]))} did not start:\n{self.last_words()}")  # type: ignore[index]

    def last_words(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-15:])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Server:
    """A replica, with or without a gateway beside it."""

    def __init__(self, with_gateway: bool = True, more: Sequence[str] = (), log: Path | None = None) -> None:
        self.http, self.grpc, self.metrics, port = free_ports(4)
        self.gateway = port if with_gateway else 0
        ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics, "gateway": self.gateway}
        self.command = Command(["serve", *(f"--{name}-port={port}" for name, port in ports.items()), *more], log)
        self.url = f"http://127.0.0.1:{self.gateway}"
        self.grpc_url = f"127.0.0.1:{self.grpc}"

    @property
    def pid(self) -> int:
        return self.command.process.pid

    def wait_ready(self) -> None:
        port, path = (self.gateway, "/health/ready") if self.gateway else (self.http, "/v2/models/decoder/ready")
        self.command.wait_for(f"http://127.0.0.1:{port}{path}")


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        server.wait_ready()
        yield server
    finally:
        server.command.stop()
