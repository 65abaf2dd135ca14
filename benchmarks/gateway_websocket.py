"""First tokens over the WebSocket, beside the same requests to Triton itself."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.gateway_load import Cpu, GrpcClient
from benchmarks.gateway_parts import MODEL, Row, gateway, show
from benchmarks.gateway_triton import Requests, tritons
from tidewright.bench.machine import wait_idle
from tidewright.bench.sweep import percentile

STREAMS, TOKENS = 100, 32
APART = 0.1  # seconds between two that come one after the other
# Here the longest wait is the figure, and nothing is to be done about it.
_PATIENT = {"degrade_wait_short": 600, "degrade_wait_fallback": 700, "degrade_wait_shed": 800}


@asynccontextmanager
async def _opened(port: int, count: int) -> AsyncIterator[list[ClientConnection]]:
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(await stack.enter_async_context(connect(f"ws://127.0.0.1:{port}/v1/stream", proxy=None)))
            await made[-1].send('{"type": "open"}')
            await made[-1].recv()
        yield made


async def _stream(connection: ClientConnection, body: dict) -> float:
    """Seconds to the first token."""
    sent, first = time.perf_counter(), 0.0
    await connection.send(msgspec.json.encode({"type": "generate", "id": "1", "request": body}).decode())
    while (message := msgspec.json.decode(await connection.recv()))["type"] != "done":
        if message["type"] == "token" and not first:
            first = time.perf_counter() - sent
    if message.get("error"):
        raise SystemExit(f"a stream failed: {message['error']}")
    return first


async def _spread(sends: list[Callable[[], Awaitable[float]]], apart: float) -> list[float]:
    """Seconds to the first token of each; `apart`: seconds from one to the next."""
    jobs = []
    for send in sends:
        jobs.append(asyncio.ensure_future(send()))
        await asyncio.sleep(apart)
    return await asyncio.gather(*jobs)


async def first_tokens(rounds: int) -> None:
    rows, below, requests = [], [], Requests(TOKENS)
    with tritons(1) as ((pid, url),), gateway([url], fallback=False, **_PATIENT) as running:
        replica = GrpcClient(url)
        async with _opened(running.port, STREAMS) as connections:

            async def direct() -> float:
                raw, sent = requests.direct(), time.perf_counter()
                answer = await replica.generate(raw, None)
                return answer.times[0] - sent

            for apart in (APART, 0.0):
                found: dict[str, list[list[float]]] = {"direct": [], "WebSocket": []}
                for number in range(rounds + 1):
                    wait_idle(2)
                    alone = await _spread([direct] * STREAMS, apart)
                    wait_idle(2)
                    cpu = Cpu(gateway=running.pid, triton=pid)
                    sends = [lambda c=connection: _stream(c, requests.body()) for connection in connections]
                    through = await _spread(sends, apart)
                    if number:  # the first warms up
                        found["direct"].append(alone)
                        found["WebSocket"].append(through)
                how = f"one each {1e3 * apart:g} ms" if apart else "all at once"
                for name, lists in found.items():
                    for share in (50, 99):
                        value = 1e3 * statistics.median(percentile(times, share) for times in lists)
                        target = ("< 500 ms", value < 500) if name == "WebSocket" else ("", None)
                        rows.append(Row(f"{STREAMS} streams, {how}; {name}, p{share}", f"{value:.0f} ms", *target))
                below.append(f"{how}: {cpu.text(STREAMS)}")
        await replica.close()
    show(f"first token of the real Triton, {TOKENS} tokens each, model {MODEL}, medians of {rounds}", rows, below)
