"""Does the memory of a server grow with what it serves? `python -m benchmarks.server_memory --minutes 60`.

First of tritonserver alone, by kind of request: bytes that it keeps of each, in quarters of `--count` requests, over
the gateway's own client and Triton's HTTP. Then of each process of `tidewright serve` with its gateway, sampled once a
minute, under `--rate` mixed requests a second: chats, streams, clients that leave, bad requests, and Triton's own
endpoints beside the gateway. `--cancel-at-end` has the client cancel each call after its last response.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import msgspec
import psutil

from benchmarks.gateway_load import HttpClient, request
from benchmarks.gateway_soak import Soak
from tidewright.bench.machine import family, free_ports, process_name
from tidewright.cache import EMBEDDED_MODEL
from tidewright.launch.prepare import prepare
from tidewright.schema import SamplingParams
from tidewright_gateway.replicas import triton
from tidewright_gateway.replicas.triton import CallRequest, TritonClient

AT_ONCE = 16
QUARTERS = 4
START_PATIENCE = 180.0  # seconds
DIRECT_SHARE = 0.3  # of the rate, beside the gateway


class Server:
    """`tidewright serve` on free ports."""

    def __init__(self, model: str, more: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - for as long as the server runs
        ports = free_ports(4)
        self.http_port, self.grpc_port, _, self.gateway_port = ports
        names = ("http", "grpc", "metrics", "gateway")
        flags = [text for name, port in zip(names, ports, strict=True) for text in (f"--{name}-port", str(port))]
        command = [str(Path(sys.executable).with_name("tidewright")), "serve", "--model", model, *flags, *more]
        self._process = subprocess.Popen(command, stderr=self._log)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{self.gateway_port}/health/ready", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        self._log.seek(0)
        raise SystemExit(f"the server did not start:\n{self._log.read()}")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)

    def memory(self) -> dict[str, float]:
        """MiB that each process has of its own (USS)."""
        found: dict[str, float] = {}
        for process in family(self._process.pid):
            try:
                name = process_name(process)
                found[name] = found.get(name, 0.0) + process.memory_full_info().uss / 2**20
            except psutil.NoSuchProcess:
                pass
        return found

    @property
    def triton(self) -> psutil.Process:
        return next(each for each in family(self._process.pid) if each.name() == "tritonserver")


@contextmanager
def running(model: str, more: Sequence[str]) -> Iterator[Server]:
    server = Server(model, more)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


class Callers:
    """What is asked of Triton, one request a call."""

    def __init__(self, server: Server) -> None:
        self._client = TritonClient(f"127.0.0.1:{server.grpc_port}", 1)
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}/v2/models", trust_env=False)
        self._rng, self._number = random.Random(0), 0
        self.kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "status": self._status,
            "stream of 1 token": lambda: self._stream(1),
            "stream of 8 tokens": lambda: self._stream(8),
            "stream, left": self._left,
            "HTTP generate": lambda: self._generate("generate"),
            "HTTP failsafe": lambda: self._generate("failsafe"),
        }

    async def close(self) -> None:
        await self._client.close()
        await self._http.aclose()

    async def any(self) -> None:
        await self._rng.choice(list(self.kinds.values()))()

    async def _status(self) -> None:
        await self._client.control("status", 10)

    async def _stream(self, tokens: int) -> None:
        self._number += 1
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        request = CallRequest(f"memory-{self._number}", [5, 6, 7], msgspec.json.encode(sampling))
        call = self._client.generate("decoder", request)
        try:
            while not (await call.read()).finish_reason:
                pass
        finally:
            call.close()

    async def _left(self) -> None:
        job = asyncio.create_task(self._stream(64))
        await asyncio.sleep(self._rng.uniform(0.0, 0.1))
        job.cancel()
        await asyncio.wait((job,))

    async def _generate(self, model: str) -> None:
        body = {"text_input": "The sea is", "max_tokens": 1, "temperature": 0.0}
        (await self._http.post(f"/{model}/generate", json=body, timeout=60)).raise_for_status()


async def by_kind(server: Server, count: int) -> None:
    callers, process = Callers(server), server.triton
    print(f"| {count} requests, {AT_ONCE} at once | bytes of each, by quarter | tritonserver, MiB |\n|---|---|---|")
    for name, call in callers.kinds.items():
        await _repeat(call, count // QUARTERS)  # pools and caches fill
        sizes = [process.memory_full_info().uss]
        for _ in range(QUARTERS):
            await _repeat(call, count // QUARTERS)
            sizes.append(process.memory_full_info().uss)
        parts = [(after - before) / (count // QUARTERS) for before, after in pairwise(sizes)]
        print(f"| {name} | {', '.join(f'{part:.0f}' for part in parts)} | {sizes[-1] / 2**20:.1f} |", flush=True)
    await callers.close()


async def _repeat(call: Callable[[], Awaitable[None]], count: int) -> None:
    for _ in range(0, count, AT_ONCE):
        await asyncio.gather(*(call() for _ in range(AT_ONCE)))


async def mixed(server: Server, minutes: float, rate: float) -> None:
    listed = httpx.get(f"http://127.0.0.1:{server.gateway_port}/v1/models", trust_env=False).json()
    messages = [{"role": "user", "content": "Tell me a story."}]
    body = {"model": listed["data"][0]["id"], "messages": messages, "max_tokens": 8, "ignore_eos": True}
    whole, stream = request(body), request({**body, "stream": True})
    soak = Soak(HttpClient(server.gateway_port), whole, stream, None)
    callers = Callers(server)
    load = asyncio.gather(
        soak.run(60 * minutes, rate * (1 - DIRECT_SHARE)), _direct(callers, 60 * minutes, rate * DIRECT_SHARE)
    )
    samples: list[dict[str, float]] = []
    print("minute:", *server.memory(), sep=" | ")
    while not load.done():
        samples.append(server.memory())
        print(len(samples) - 1, *(f"{size:.1f}" for size in samples[-1].values()), sep=" | ", flush=True)
        await asyncio.wait((load,), timeout=60)
    _, errors = await load
    await callers.close()
    print(f"{soak.done.total()} requests over the gateway, {soak.wrong.total()} wrong; {errors} errors beside it")
    for error, number in soak.wrong.most_common(5):
        print(f"  {number} x {error}")
    print("| process | MiB at first | at the end | MiB a minute, second half |\n|---|---|---|---|")
    half = samples[len(samples) // 2 :]
    for name in samples[-1]:
        sizes = [sample.get(name, 0.0) for sample in half]
        slope = statistics.linear_regression(range(len(sizes)), sizes).slope if len(sizes) > 1 else 0.0
        print(f"| {name} | {samples[0].get(name, 0.0):.1f} | {sizes[-1]:.1f} | {slope:+.3f} |")


async def _direct(callers: Callers, seconds: float, rate: float) -> int:
    """The number of errors."""
    rng, until, errors = random.Random(1), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        await asyncio.sleep(rng.expovariate(rate))
        try:
            await callers.any()
        except Exception as error:
            errors += 1
            print(f"beside the gateway: {error!r}", flush=True)
    return errors


def _cancel_at_end() -> None:
    triton.let_end = lambda call: call.cancel()


async def _main(server: Server, options: argparse.Namespace) -> None:
    if options.count:
        await by_kind(server, options.count)
    if options.minutes:
        await mixed(server, options.minutes, options.rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--count", type=int, default=8000, help="requests of each kind; 0: none")
    parser.add_argument("--minutes", type=float, default=10, help="of mixed requests; 0: none")
    parser.add_argument("--rate", type=float, default=10, help="mixed requests a second")
    parser.add_argument("--cancel-at-end", action="store_true", help="cancel each call after its last response")
    options, more = parser.parse_known_args()
    if options.cancel_at_end:
        _cancel_at_end()
    prepare(options.model)
    os.environ.setdefault("TIDEWRIGHT_THREADS", "1")
    with running(options.model, more) as server:
        asyncio.run(_main(server, options))


if __name__ == "__main__":
    main()
