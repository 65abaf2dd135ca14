"""Clients that cost little, for `benchmarks.gateway`: they share the cores with what they measure.

HTTP/1.1 as far as the gateway's answers need it, and gRPC for the replica itself; load that waits for answers (closed)
or arrives by chance whatever they do (open); and the share of a core that each process used.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from benchmarks.echo_replica import METHOD, SERVICE
from tidewright.bench.machine import family
from tidewright.bench.sweep import percentile
from tidewright_gateway.replicas.triton import let_end

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
DONE, LAST_CHUNK = b"data: [DONE]", b"0\r\n\r\n"


@dataclass
class Answer:
    """Times are of time.perf_counter()."""

    times: list[float] = field(default_factory=list)  # when parts of its body came
    sent: float = 0.0
    status: int = 200
    body: bytes = b""
    error: str = ""


Send = Callable[[], Awaitable[Answer]]


def request(body: dict[str, Any], path: str = "/v1/chat/completions", kind: str = "application/json") -> bytes:
    """One HTTP request."""
    return post(json.dumps(body).encode(), path, kind)


def post(content: bytes, path: str, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


class Connection(asyncio.Protocol):
    """Carries one request at a time."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[Answer] | None = None
        self.times: list[float] = []  # of the answer that comes
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end(Answer(error="the connection was closed"))

    def send(self, raw: bytes) -> asyncio.Future[Answer]:
        self._received, self._needed, self.times = b"", -1, list[float]()
        self._sent = time.perf_counter()
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(raw)
        return self._waiter

    def leave(self) -> None:
        """As a client that does not wait for the answer."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._needed < 0:
            end = self._received.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            self._body_at = end
            found = _LENGTH.search(self._received, 0, end)
            self._needed = end + int(found[1]) if found else 0  # 0: chunks
        if len(self._received) > self._body_at:
            self.times.append(time.perf_counter())
        if len(self._received) >= self._needed if self._needed else self._received.endswith(LAST_CHUNK):
            status, body = int(self._received[9:12]), self._received[self._body_at :]
            self._end(Answer(self.times, self._sent, status, body))

    def _end(self, answer: Answer) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(answer)


class HttpClient:
    """Keeps its connections; as many as there are requests at a time."""

    def __init__(self, port: int) -> None:
        self._port, self._free = port, list[Connection]()

    async def connect(self) -> Connection:
        while self._free:
            if (connection := self._free.pop()).is_open:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port)
        return made

    async def warm(self, count: int) -> None:
        """Has so many connections from now on."""
        self._free = [await self.connect() for _ in range(count)]

    async def send(self, raw: bytes) -> Answer:
        connection = await self.connect()
        answer = await connection.send(raw)
        self._free.append(connection)
        return answer

    async def generate(self, raw: bytes, stream: bool, responses: int | None = 1) -> Answer:
        """The answer must be whole: of a streamed chat, an opening, its `responses` if they are known, and the end."""
        answer = await self.send(raw)
        if answer.error:
            return answer
        if answer.status != 200:
            answer.error = f"status {answer.status}: {answer.body[:200].decode()}"
        elif stream:
            events = answer.body.count(b"data: ")
            if DONE not in answer.body or b'"finish_reason":"length"' not in answer.body:
                answer.error = f"a stream that ended early: {answer.body[-200:].decode()}"
            elif responses is not None and events != responses + 2:
                answer.error = f"a stream of {events} events, where {responses + 2} were due"
        elif b'"finish_reason":"length"' not in answer.body:
            answer.error = "no whole answer"
        answer.body = b""
        return answer

    async def get(self, path: str) -> bytes:
        return (await self.send(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())).body

    def close(self) -> None:
        for connection in self._free:
            connection.leave()


class GrpcClient:
    """The replica without a gateway; a call for each request."""

    def __init__(self, url: str) -> None:
        self._channel = grpc.aio.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)])
        self._method = self._channel.unary_stream(f"/{SERVICE}/{METHOD}")

    async def generate(self, raw: bytes, responses: int | None = 1) -> Answer:
        call, last, answer = self._method(raw), b"", Answer()
        while b"length" not in last:
            last = await call.read()
            if last is grpc.aio.EOF:
                answer.error = "an answer without an end"
                return answer
            answer.times.append(time.perf_counter())
        let_end(call)
        if responses not in (None, len(answer.times)):
            answer.error = f"{len(answer.times)} responses, where {responses} were due"
        return answer

    async def close(self) -> None:
        await self._channel.close()


async def _answer(send: Send) -> Answer:
    try:
        return await send()
    except (OSError, grpc.aio.AioRpcError) as error:
        return Answer(error=repr(error))


@dataclass
class Load:
    """What came of some requests; times in seconds."""

    seconds: float = 0.0
    firsts: list[float] = field(default_factory=list)
    lasts: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def take(self, due: float, answer: Answer) -> None:
        if answer.error:
            self.errors[answer.error] += 1
        else:
            self.firsts.append(answer.times[0] - due)
            self.lasts.append(answer.times[-1] - due)

    @property
    def rate(self) -> float:
        return len(self.lasts) / self.seconds

    def ms(self, share: float, first: bool = False) -> float:
        return 1e3 * percentile(self.firsts if first else self.lasts, share)


async def closed_loop(send: Send, callers: int, seconds: float) -> Load:
    """Each caller sends its next request when it has its answer."""
    load, began = Load(), time.perf_counter()

    async def call() -> None:
        while (due := time.perf_counter()) < began + seconds:
            load.take(due, await _answer(send))

    await asyncio.gather(*(call() for _ in range(callers)))
    load.seconds = time.perf_counter() - began
    return load


async def open_loop(send: Send, rate: float, seconds: float, seed: int) -> Load:
    """Requests arrive by chance, `rate` a second; times count from when each was due, so the client's own are in."""
    rng, load, began = random.Random(seed), Load(), time.perf_counter()
    running: set[asyncio.Task[None]] = set()

    async def call(due: float) -> None:
        load.take(due, await _answer(send))

    due = began
    while (due := due + rng.expovariate(rate)) < began + seconds:
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(call(due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    load.seconds = time.perf_counter() - began
    return load


async def at_once(send: Send, count: int) -> Load:
    load, due = Load(), time.perf_counter()
    for answer in await asyncio.gather(*(_answer(send) for _ in range(count))):
        load.take(due, answer)
    load.seconds = time.perf_counter() - due
    return load


class Cpu:
    """Seconds of CPU time that this process, and others each with its children, used since this was made."""

    def __init__(self, **pids: int) -> None:
        self._pids = pids
        self._began, self._before = time.perf_counter(), self._seconds()

    def _seconds(self) -> dict[str, float]:
        others = {name: sum(sum(each.cpu_times()[:2]) for each in family(pid)) for name, pid in self._pids.items()}
        return {"client": time.process_time(), **others}

    def text(self, requests: int) -> str:
        """Share of a core, and milliseconds a request, of each."""
        passed = time.perf_counter() - self._began
        used = {name: after - self._before[name] for name, after in self._seconds().items()}
        return ", ".join(
            f"{name} {seconds / passed:.0%} ({1e3 * seconds / max(requests, 1):.2f} ms)"
            for name, seconds in used.items()
        )
