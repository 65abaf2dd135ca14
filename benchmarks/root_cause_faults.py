"""The stack of `benchmarks.root_cause`, and what can go wrong with it. All processes are real, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tidewright.bench.machine import free_ports
from tidewright.config import Settings
from tidewright.launch.server import ServerStartError, TritonServer

MODEL = "smollm2-135m"
PLACES = 8  # sequences in a batch
KV_CACHE = "24MiB"  # about a thousand tokens
KEYS = {"ops": ["--role", "admin"], "busy": [], "limited": ["--requests-per-second", "1"]}


class Stack:
    """Two Tritons without the watchdog of `serve`, so that a fault stays; the second has a small KV cache."""

    def __init__(self, model_dir: Path, folder: Path) -> None:
        self._model_dir, self._folder, self._exits = model_dir, folder, ExitStack()
        self.tritons: list[TritonServer] = []
        self.keys: dict[str, str] = {}
        self.key_file = str(folder / "ops.key")
        self.gateway_port, self.redis_port = free_ports(2)

    def __enter__(self) -> Stack:
        with ExitStack() as exits:
            for kv_cache in ("512MiB", KV_CACHE):
                http, grpc, metrics = free_ports(3)
                settings = Settings(
                    http_port=http, grpc_port=grpc, metrics_port=metrics, model=str(self._model_dir), threads=1,
                    max_running=PLACES, kv_cache_memory=kv_cache, shutdown_grace=0,
                )  # fmt: skip
                triton = TritonServer(settings, self._model_dir)
                exits.callback(triton.stop)
                triton.start()
                try:
                    triton.wait_ready()
                except ServerStartError:  # Triton aborts in one of some thousand starts on a busy machine
                    triton.start_again()
                self.tritons.append(triton)
            self.start_redis()
            exits.callback(lambda: self.redis.kill())
            self._make_keys()
            self.gateway = self._start_gateway()
            exits.callback(self.gateway.wait)
            exits.callback(self.gateway.terminate)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    @property
    def addresses(self) -> list[str]:
        return [
            f"127.0.0.1:{port}" for port in (self.gateway_port, *(one.settings.metrics_port for one in self.tritons))
        ]

    def start_redis(self) -> None:
        command = ["redis-server", "--port", str(self.redis_port), "--bind", "127.0.0.1", "--save", ""]
        self.redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def _make_keys(self) -> None:
        keys = str(self._folder / "keys.yaml")
        program = str(Path(sys.executable).with_name("tidewright"))
        for name, options in KEYS.items():
            command = [program, "keys", "create", name, "--keys", keys, *options]
            made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            self.keys[name] = made.strip().splitlines()[-1]
        Path(self.key_file).write_text(self.keys["ops"])

    def _start_gateway(self) -> subprocess.Popen[bytes]:
        options = {
            "model": self._model_dir,
            "served_model_name": MODEL,
            "port": self.gateway_port,
            "replicas": ",".join(f"127.0.0.1:{one.settings.grpc_port}" for one in self.tritons),
            "keys": self._folder / "keys.yaml",
            "limits_store": f"redis://127.0.0.1:{self.redis_port}/0",
            "fallback": False,
            "cache_size": 0,
            "max_queue": 16,
            "max_queue_share": 1.0,
        }
        environment = {
            **os.environ,
            **{f"TIDEWRIGHT_GATEWAY_{name.upper()}": str(text) for name, text in options.items()},
        }
        gateway = subprocess.Popen([sys.executable, "-m", "tidewright_gateway"], env=environment)
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"http://{self.addresses[0]}/health/ready", trust_env=False).status_code == 200:
                    return gateway
            except httpx.TransportError:
                pass
            if gateway.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the gateway did not start")
            time.sleep(0.1)

    def child(self, triton: TritonServer, what: str) -> psutil.Process:
        """The oldest process below it with this in its command: a younger engine stands by."""
        family = psutil.Process(triton.pid).children(recursive=True)
        alive = [one for one in family if one.status() != psutil.STATUS_ZOMBIE]
        return min((one for one in alive if what in " ".join(one.cmdline())), key=psutil.Process.create_time)

    @contextmanager
    def load(self, key: str, clients: int, body: dict[str, object], pause: float = 0.0) -> Iterator[None]:
        """Clients that ask again and again, whatever they get."""
        ended = threading.Event()

        def ask() -> None:
            headers = {"Authorization": f"Bearer {self.keys[key]}"}
            with httpx.Client(base_url=f"http://{self.addresses[0]}", headers=headers, trust_env=False) as client:
                while not ended.wait(pause):
                    try:
                        client.post("/v1/completions", json={"model": MODEL, **body}, timeout=120)
                    except httpx.TransportError:
                        time.sleep(0.1)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()


@dataclass(frozen=True)
class Fault:
    name: str
    inject: Callable[[Stack], AbstractContextManager[None]]
    """Mends it when it is left."""
    named: str
    """What a finding that names the cause has, as a regular expression."""
    wait: float = 4.0
    """Seconds until somebody who was paged runs the first command."""


@contextmanager
def _engine_killed(stack: Stack) -> Iterator[None]:
    stack.child(stack.tritons[0], "tidewright.engine").kill()
    yield


@contextmanager
def _engine_frozen(stack: Stack) -> Iterator[None]:
    engine = stack.child(stack.tritons[0], "tidewright.engine")
    engine.suspend()
    yield
    if engine.is_running():
        engine.resume()


@contextmanager
def _stub_killed(stack: Stack) -> Iterator[None]:
    triton = stack.tritons[0]
    stack.child(triton, "/decoder/").kill()
    yield
    triton.stop()
    triton.start_again()


@contextmanager
def _replica_killed(stack: Stack) -> Iterator[None]:
    triton = stack.tritons[0]
    psutil.Process(triton.pid).kill()
    yield
    triton.stop()
    triton.start_again()


@contextmanager
def _replica_frozen(stack: Stack) -> Iterator[None]:
    assert stack.tritons[0].pid
    os.kill(stack.tritons[0].pid, signal.SIGSTOP)
    yield
    os.kill(stack.tritons[0].pid, signal.SIGCONT)


@contextmanager
def _redis_killed(stack: Stack) -> Iterator[None]:
    stack.redis.kill()
    stack.redis.wait()
    with stack.load("limited", 1, {"prompt": "Hi", "max_tokens": 1}, pause=1.2):
        yield
    stack.start_redis()


def _overload(stack: Stack) -> AbstractContextManager[None]:
    return stack.load("busy", 60, {"prompt": "The sea is", "max_tokens": 64, "ignore_eos": True})


def _kv_short(stack: Stack) -> AbstractContextManager[None]:
    return stack.load("busy", 12, {"prompt": "The sea is wide. " * 40, "max_tokens": 400, "ignore_eos": True})


def _key_over_its_limit(stack: Stack) -> AbstractContextManager[None]:
    return stack.load("limited", 4, {"prompt": "Hi", "max_tokens": 1}, pause=0.1)


def _wrong_client(stack: Stack) -> AbstractContextManager[None]:
    return stack.load("busy", 1, {"prompt": "Hi", "temperature": 9}, pause=0.1)


FAULTS = (
    Fault("engine killed", _engine_killed, r"engine of decoder (died and was started again [0-9] s|is down)"),
    Fault("engine frozen", _engine_frozen, r"no sign of life from the engine|model decoder is not healthy", wait=7),
    Fault("stub killed", _stub_killed, r"process of model decoder has been silent", wait=7),
    Fault("replica killed", _replica_killed, r"replica \S+ takes no requests|can't be reached"),
    Fault("replica frozen", _replica_frozen, r"replica \S+ takes no requests: no answer"),
    Fault("Redis killed", _redis_killed, r"store of limits is lost"),
    Fault("overload", _overload, r"more load than places.*busiest key busy"),
    Fault("KV cache short", _kv_short, r"KV cache is short", wait=10),
    Fault("key over its limit", _key_over_its_limit, r"key limited is refused .* by its limit requests_per_second"),
    Fault("wrong client", _wrong_client, r"requests end with invalid_value \(status 400\)"),
)
