"""What the benchmarks of the gateway are put together from: its process, replicas that echo, and printed tables."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.gateway_load import HttpClient
from tidewright.bench.machine import free_ports
from tidewright.cache import EMBEDDED_MODEL
from tidewright.launch.prepare import prepare

ROOT = Path(__file__).parents[1]
MODEL = "echo"
PER_RESPONSE = 8  # tokens
console = Console(width=140, highlight=False)


@dataclass(frozen=True)
class Row:
    figure: str
    value: str
    target: str = ""
    met: bool | None = None


def show(title: str, rows: Sequence[Row], below: Sequence[str] = ()) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("target", justify="right")
    table.add_column("met")
    for row in rows:
        table.add_row(row.figure, row.value, row.target, {None: "", True: "yes", False: "NO"}[row.met])
    console.print(table)
    for line in below:
        console.print(line)


@contextmanager
def process(*arguments: str, port: int, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A Python module that runs, and listens on `port`."""
    started = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, **options)
    try:
        wait_for_port(port, started)
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()


def wait_for_port(port: int, started: subprocess.Popen[bytes], patience: float = 60) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until and started.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}: {started.args!r}")


@dataclass(frozen=True)
class Echo:
    url: str
    pid: int


@contextmanager
def echoes(count: int = 1, pause: float = 0.0) -> Iterator[list[Echo]]:
    with ExitStack() as stack:
        made = []
        for port in free_ports(count):
            arguments = ["--port", str(port), "--per-response", str(PER_RESPONSE), "--pause", str(pause)]
            started = stack.enter_context(process("benchmarks.echo_replica", *arguments, port=port))
            made.append(Echo(f"127.0.0.1:{port}", started.pid))
        yield made


class Gateway:
    def __init__(self, port: int, pid: int, log: Path) -> None:
        self.port, self.pid, self._log = port, pid, log

    @property
    def log(self) -> list[str]:
        return self._log.read_text().splitlines()

    async def metrics(self) -> dict[tuple[str, ...], float]:
        """Name without its prefix, and values of the labels, to the value."""
        client = HttpClient(self.port)
        text = (await client.get("/metrics")).decode()
        client.close()
        return {
            (sample.name.removeprefix("tidewright_gateway_"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@contextmanager
def gateway(urls: Sequence[str], **options: Any) -> Iterator[Gateway]:
    (port,) = free_ports(1)
    values = {"model": model_folder(), "served_model_name": MODEL, "port": port, "replicas": ",".join(urls), **options}
    environment = {f"TIDEWRIGHT_GATEWAY_{name.upper()}": str(value) for name, value in values.items()}
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        arguments = {"env": {**os.environ, **environment}, "stderr": log}
        with process("tidewright_gateway", port=port, **arguments) as started:
            yield Gateway(port, started.pid, Path(log.name))


@functools.cache
def model_folder() -> Path:
    return prepare(EMBEDDED_MODEL)
