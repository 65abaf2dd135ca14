"""The gateway under a mix of requests for a while: does its memory grow, do its health checks raise false alarms?"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.gateway_load import HttpClient, request
from tidewright.bench.machine import family
from tidewright_gateway.replicas.triton import TritonClient

RATE = 100.0  # requests a second
LEAVE_AFTER = 0.02  # seconds
REFUSED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1\r\n\r\n{",
    request({"model": "nobody", "prompt": "x"}, "/v1/completions"),
    request({"prompt": "x" * 5000, "max_tokens": -1}, "/v1/completions"),
    request({"model": "x", "messages": []}),
    request({}, "/nowhere"),
    request({}, kind="text/plain"),
)


class Soak:
    """`whole` and `stream` are requests that are answered, with `responses` of the replica."""

    def __init__(self, client: HttpClient, whole: bytes, stream: bytes, responses: int | None) -> None:
        self._client, self._whole, self._stream, self._responses = client, whole, stream, responses
        self.done: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()

    async def run(self, seconds: float, rate: float = RATE) -> None:
        """Requests arrive by chance."""
        rng, until = random.Random(0), time.monotonic() + seconds
        running: set[asyncio.Task[None]] = set()
        kinds = ("whole", "stream", "cancelled", "cancelled stream", "refused")
        while time.monotonic() < until:
            await asyncio.sleep(rng.expovariate(rate))
            (kind,) = rng.choices(kinds, (50, 25, 8, 7, 10))
            task = asyncio.create_task(self._send(kind, rng.choice(REFUSED)))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    async def _send(self, kind: str, refused: bytes) -> None:
        error = ""
        if kind == "refused":
            answer = await self._client.send(refused)
            if not 400 <= answer.status < 500:
                error = f"a bad request got {answer.status}"
        elif kind.startswith("cancelled"):
            connection = await self._client.connect()
            connection.send(self._stream if kind.endswith("stream") else self._whole)
            await asyncio.sleep(LEAVE_AFTER)
            connection.leave()
        else:
            is_stream = kind == "stream"
            raw = self._stream if is_stream else self._whole
            error = (await self._client.generate(raw, is_stream, self._responses)).error
        self.done[kind] += 1
        if error:
            self.wrong[error] += 1


class Memory(NamedTuple):
    at: float  # seconds
    mib: float


async def watch_memory(pid: int, seconds: float, every: float = 1.0) -> list[Memory]:
    """What the process and its children have of their own: the proportional size depends on who else runs."""
    began, found = time.monotonic(), list[Memory]()
    while (passed := time.monotonic() - began) < seconds:
        found.append(Memory(passed, sum(each.memory_full_info().uss for each in family(pid)) / 2**20))
        await asyncio.sleep(every)
    return found


def slope(memory: Sequence[Memory]) -> float:
    """MiB a minute over the second half: before, pools and caches fill."""
    half = memory[len(memory) // 2 :]
    times, sizes = [each.at for each in half], [each.mib for each in half]
    return 60 * statistics.linear_regression(times, sizes).slope


async def count_probes(url: str) -> int:
    """How often the echo replica was asked for its status."""
    client = TritonClient(url, 1)
    try:
        return int(await client.control("probes", 10))
    finally:
        await client.close()
