"""A tritonserver without `tidewright serve` around it: started by the command in docs/configuration.md."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from helpers.needs import needs
from helpers.processes import child
from helpers.triton import Stream
from tidewright.bench.machine import free_ports
from tidewright.launch.triton_install import assemble_backend_dir, find_triton, libpython_dirs
from tidewright.schema import DRAINING

ROOT = Path(__file__).resolve().parents[2]
(COMMAND,) = re.findall(r"^tritonserver (?:.*\\\n)*.*$", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE)
LONG = {"temperature": 0, "max_tokens": 150, "ignore_eos": True}
pytestmark = pytest.mark.timeout(600)


def eventually(condition: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@needs("server")
class StockTriton:
    def __init__(self, model_dir: Path, folder: Path, *options: str, **environment: str) -> None:
        http, grpc, metrics = free_ports(3)
        self.url, self.grpc_url = f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        install = find_triton()
        _, *arguments = shlex.split(COMMAND.replace("\\\n", " "))
        addresses = [f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")]
        ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
        # In place of the link into /opt/tritonserver.
        backends = assemble_backend_dir(install, folder / "backends")
        region = f"--backend-config=python,shm-region-prefix-name=stock_{os.getpid()}_{http}_"
        command = [
            str(install.binary),
            *arguments,
            f"--backend-directory={backends}",
            region,
            *addresses,
            *ports,
            *options,
        ]
        self.log = folder / "log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env={
                    **os.environ,
                    "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}",
                    "VIRTUAL_ENV": sys.prefix,
                    "LD_LIBRARY_PATH": os.pathsep.join(libpython_dirs()),
                    "TIDEWRIGHT_MODEL": str(model_dir),
                    "TIDEWRIGHT_THREADS": "1",
                    **environment,
                },
            )

    def __enter__(self) -> StockTriton:
        eventually(lambda: self.process.poll() is not None or self.status("health/live") == 200, 240)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            try:
                self.process.wait(5)  # how it ends has a test; here a model whose stub was killed may never be unloaded
            except subprocess.TimeoutExpired:
                self.process.kill()
            psutil.wait_procs(family, 20)
        for region in Path("/dev/shm").glob(f"stock_{os.getpid()}_*"):
            region.unlink()

    def status(self, path: str) -> int:
        try:
            return httpx.get(f"{self.url}/v2/{path}", timeout=10, trust_env=False).status_code
        except httpx.TransportError:
            return 0

    def post(self, path: str, **body: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v2/{path}", json=body, timeout=120, trust_env=False)

    def command(self, name: str, *options: str) -> tuple[int, str]:
        program = Path(sys.executable).with_name("tidewright")
        done = subprocess.run([program, name, "--url", self.url, *options], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def is_healthy(self) -> bool:
        return self.command("health")[0] == 0

    def generates(self) -> bool:
        answer = self.post("models/generate/generate", text_input="The sea is", max_tokens=2)
        return answer.status_code == 200 and answer.json().get("served_by") == "decoder"


@pytest.fixture(scope="module")
def stock(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockTriton]:
    with StockTriton(model_dir, tmp_path_factory.mktemp("stock")) as running:
        yield running


def test_it_serves_and_probes_say_so(stock: StockTriton) -> None:
    assert stock.process.poll() is None, stock.log.read_text()[-3000:]
    eventually(stock.is_healthy)
    assert stock.generates()
    assert [stock.status(path) for path in ("health/live", "health/ready", "models/decoder/ready")] == [200, 200, 200]
    with Stream(stock.grpc_url) as stream:
        stream.send("1", text_input="Once", stream=True, sampling_parameters={"temperature": 0, "max_tokens": 5})
        assert len(stream.finish()["1"].token_ids) == 5


def test_an_engine_that_is_killed_is_replaced_and_its_stream_goes_on(stock: StockTriton) -> None:
    with Stream(stock.grpc_url) as stream:
        stream.send("1", text_input="Once upon a time", stream=True, sampling_parameters=LONG)
        while len(stream.generations["1"].token_ids) < 10:
            stream.next()
        child(stock.process.pid, "tidewright.engine").kill()
        generation = stream.finish()["1"]
    assert generation.error is None
    assert len(generation.token_ids) == 150
    eventually(stock.is_healthy)


def test_a_dead_stub_is_seen_by_our_probe_alone_and_stays_dead_until_it_is_loaded_again(stock: StockTriton) -> None:
    child(stock.process.pid, "/decoder/").kill()
    eventually(lambda: not stock.is_healthy())
    status, words = stock.command("health")
    assert (status, "Stub process" in words) == (1, True)
    assert stock.command("health", "--live")[0] == 1
    assert [stock.status(path) for path in ("health/live", "health/ready", "models/decoder/ready")] == [200, 200, 200]
    for verb in ("unload", "load"):
        assert stock.post(f"repository/models/decoder/{verb}").status_code == 200
        if verb == "unload":
            eventually(lambda: stock.status("models/decoder/ready") != 200)
    eventually(stock.is_healthy)
    eventually(stock.generates)


def test_a_drain_and_then_sigterm_lose_nothing(model_dir: Path, tmp_path: Path) -> None:
    with StockTriton(model_dir, tmp_path, TIDEWRIGHT_SHUTDOWN_GRACE="25") as server:
        eventually(server.is_healthy)
        with Stream(server.grpc_url) as stream:
            stream.send("1", text_input="Once upon a time", stream=True, sampling_parameters=LONG)
            while len(stream.generations["1"].token_ids) < 5:
                stream.next()
            assert server.command("drain", "--no-wait") == (0, "Draining.\n")
            status, words = server.command("health")
            assert (status, DRAINING in words) == (1, True)
            assert server.command("health", "--live") == (0, "alive\n")
            assert server.status("health/ready") == 200
            refused = server.post("models/decoder/generate", text_input="a", max_tokens=1)
            assert "send the request to another" in refused.text
            server.process.send_signal(signal.SIGTERM)
            generation = stream.finish()["1"]
        assert generation.error is None
        assert len(generation.token_ids) == 150
        assert server.process.wait(60) == 0


def test_a_model_without_which_it_was_configured_is_named(model_dir: Path, tmp_path: Path) -> None:
    with StockTriton(model_dir, tmp_path, "--load-model=fallback") as server:
        assert server.process.wait(120) != 0
    assert "no fallback is configured; load the other models only, or set TIDEWRIGHT_FALLBACK" in server.log.read_text()
