"""The servers that ours is held against: vLLM and llama.cpp, from <cache>/peers, which `make bench-peers` fills."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tidewright.bench.machine import free_ports
from tidewright.bench.targets import SILENCE, Notes, Target, TargetError
from tidewright.bench.workloads import Outcome, Request
from tidewright.cache import cache_dir
from tidewright.parent_death import signal_on_parent_death
from tidewright.quantization.gguf_index import GGUF_FILE

HOW_TO_GET = "make bench-peers"
MAX_MODEL_LEN = 2048  # tokens; the longest workload has 1025
SLOTS = 16  # requests that llama.cpp computes at once, as many as a workload has
START_TIMEOUT = 900  # seconds; the very first start of vLLM compiles the model
STOP_TIMEOUT = 10  # seconds from SIGTERM to SIGKILL


STORED = "stored"  # weights as a quantized checkpoint has them
LLAMA_TYPES = {
    "none": "",
    "int8": "Q8_0",
    "w8a8": "Q8_0",
    "int4-g32": "Q4_0",
    "int4-g64": "Q4_0",
    "int4-g128": "Q4_0",
    STORED: "with the same file",
}
"""By our schemes, the types of setup_peers.sh with about as many bits."""
VLLM_SCHEMES = {"int8": "w8a8", **{name: name for name in ("w8a8", "int4-g32", "int4-g64", "int4-g128")}}
"""By our schemes, those of the checkpoints that vLLM's build for CPUs gets from `tidewright quantize`."""


class PeerMissingError(TargetError):
    """The peer is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Peer(ABC):
    name: str
    command: Sequence[str]  # without the port
    environment: Mapping[str, str]
    path: str  # of its endpoint

    @abstractmethod
    def body(self, request: Request) -> dict[str, Any]: ...

    @abstractmethod
    def tokens(self, event: dict[str, Any], before: int) -> int:
        """Tokens generated up to this event of the answer's stream, where the events before it had `before`."""


class Vllm(Peer):
    def body(self, request: Request) -> dict[str, Any]:
        # Without the token ids there is no telling how many tokens a piece of text is made of.
        options = {"temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
        return {"model": "model", "prompt": request.prompt, "max_tokens": request.max_tokens, **options}

    def tokens(self, event: dict[str, Any], before: int) -> int:
        return before + sum(len(choice["token_ids"] or ()) for choice in event["choices"])


class LlamaCpp(Peer):
    def body(self, request: Request) -> dict[str, Any]:
        options = {"temperature": 0, "ignore_eos": True, "stream": True}
        return {"prompt": request.prompt, "n_predict": request.max_tokens, **options}

    def tokens(self, event: dict[str, Any], before: int) -> int:
        # Not those of the event: tokens that end within a character are held back, and never listed.
        count: int = event["tokens_predicted"]
        return count


def peers_dir() -> Path:
    return cache_dir() / "peers"


def vllm(model_dir: Path, checkpoint: Path | None = None, precision: str = "") -> Peer:
    """vLLM's OpenAI server as its documentation wants it on a CPU, with a quantized `checkpoint` if there is one.

    Raises:
        PeerMissingError: it is not installed.
    """
    home = peers_dir() / "vllm"
    preload = [*home.glob("tcmalloc/**/libtcmalloc_minimal.so.4"), home / "lib" / "libiomp5.so"]
    environment = {
        "LD_PRELOAD": os.pathsep.join(map(str, preload)),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(psutil.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, as ours
        "VLLM_CACHE_ROOT": str(home / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    model = [str(checkpoint or model_dir), "--served-model-name", "model", "--dtype", "bfloat16"]
    command = [_installed(home / "bin" / "vllm", "vLLM"), "serve", *model, "--max-model-len", str(MAX_MODEL_LEN)]
    return Vllm(f"vLLM {precision}".strip(), command, environment, "/v1/completions")


def llama_cpp(model_dir: Path, quantization: str = "none") -> Peer:
    """llama.cpp's server with the same bf16 weights, or with those of its own types that match our `quantization`.

    Raises:
        PeerMissingError: it is not installed, or not for this model.
    """
    home = peers_dir() / "llama.cpp"
    server = _installed(home / "build" / "bin" / "llama-server", "llama.cpp")
    if quantization not in LLAMA_TYPES:
        raise PeerMissingError(f"llama.cpp has no type of weights like {quantization}")
    form = LLAMA_TYPES[quantization]
    file = home / f"{model_dir.name}{f'-{form}' if form else ''}.gguf"
    if quantization == STORED:
        file = model_dir / GGUF_FILE
    model = _installed(file, "llama.cpp's form of the model")
    options = ["--threads", str(psutil.cpu_count() or 1), "--parallel", str(SLOTS)]
    return LlamaCpp(
        f"llama.cpp {form}".strip(),
        [server, "--model", model, *options, "--ctx-size", str(SLOTS * MAX_MODEL_LEN)],
        {},
        "/completion",
    )


def _installed(file: Path, name: str) -> str:
    if not file.exists():
        raise PeerMissingError(f"{name} is not installed; to compare with it: {HOW_TO_GET}")
    return str(file)


@contextmanager
def running(peer: Peer) -> Iterator[Target]:
    """The peer's server, ready to be measured.

    Raises:
        TargetError: it does not start; its log is named.
    """
    (port,) = free_ports(1)
    log = peers_dir() / f"{peer.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*peer.command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **peer.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
            preexec_fn=_terminate_with_parent,
        )
    try:
        _wait_healthy(process, f"http://127.0.0.1:{port}/health", f"{peer.name} (see {log})")
        yield PeerTarget(peer, f"http://127.0.0.1:{port}")
    finally:
        _end(process)


def _wait_healthy(process: subprocess.Popen[bytes], url: str, name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise TargetError(f"{name} ended with code {process.returncode} before it was ready")
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TargetError(f"{name} was not ready after {START_TIMEOUT} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server, and whatever it started that does not end with it."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT)
    for survivor in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    process.wait()
    psutil.wait_procs(family, timeout=2)


def _terminate_with_parent() -> None:
    signal_on_parent_death(signal.SIGTERM)


class PeerTarget:
    """A peer as a client sees it: server-sent events over HTTP, which are only stored while the run lasts."""

    def __init__(self, peer: Peer, url: str) -> None:
        self.name = peer.name
        self._peer = peer
        self._url = url + peer.path

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        return asyncio.run(self._run(requests))

    def close(self) -> None:
        pass

    async def _run(self, requests: Sequence[Request]) -> list[Outcome]:
        import aiohttp

        bodies = [json.dumps(self._peer.body(request)).encode() for request in requests]
        events: list[list[tuple[float, bytes]]] = [[] for _ in requests]
        errors: dict[int, str] = {}
        notes = Notes(requests)

        async def send(number: int) -> None:
            await asyncio.sleep(notes.began + requests[number].at - time.perf_counter())
            try:
                async with session.post(self._url, data=bodies[number]) as answer:
                    if answer.status != 200:
                        errors[number] = f"HTTP status {answer.status}: {(await answer.text())[:200]}"
                        return
                    async for line in answer.content:
                        if line.startswith(b"data: {"):
                            events[number].append((time.perf_counter(), line))
            except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
                errors[number] = f"{type(error).__name__}: {error}"

        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_read=SILENCE),
            headers={"Content-Type": "application/json"},
            read_bufsize=2**20,  # a line may be longer than aiohttp's own limit: llama.cpp's last repeats the prompt
        ) as session:
            await asyncio.gather(*map(send, range(len(requests))))
        for number, lines in enumerate(events):
            tokens = 0
            for at, line in lines:
                before, tokens = tokens, self._peer.tokens(json.loads(line[len("data: ") :]), tokens)
                if tokens > before:
                    notes.take(number, at, tokens - before)
        return notes.outcomes(errors)
