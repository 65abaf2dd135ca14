"""A gateway that plays what the vectors say, and judges what it saw: `python clients/conformance/scripted.py`.

It prints its address as JSON and plays until its standard input ends. The README beside it describes both sides. It
writes HTTP itself, for it must do what no server's library does: end in the middle, say nothing, cut a character.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import plays

T = TypeVar("T")
VECTORS = Path(__file__).with_name("vectors")
PATIENCE = 5.0  # seconds that a verdict waits for an exchange to end
STALL = 0.3  # seconds without a byte taken are a stall
SEND_BUFFER = 65536  # bytes: what a client does not read soon stops the writer
APIS = {"chat": "/v1/chat/completions", "complete": "/v1/completions", "models": "/v1/models"}


@dataclass
class Seen:
    """A request."""

    at: float
    connection: int
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Run:
    vector: dict[str, Any]
    seen: list[Seen] = field(default_factory=list)
    playing: int = 0
    cancelled: bool = False
    text: int = 0
    """Bytes of streams that the sockets have taken."""
    stalled_at: int | None = None

    def faults(self) -> list[str]:
        expected, found = self.vector.get("verdict", {}), []
        counts = {"requests": len(self.seen), "connections": len({one.connection for one in self.seen})}
        counts["cancelled"] = self.cancelled
        found += [
            f"{name}: {got}, not {expected[name]}" for name, got in counts.items() if expected.get(name, got) != got
        ]
        path = APIS[self.vector["api"]]
        found += [f"path {one.path}, not {path}" for one in self.seen if one.path != path]
        gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(self.seen)]
        for (least, most), gap in zip(expected.get("gaps", []), gaps, strict=False):
            found += [] if least <= gap <= most else [f"a retry after {gap:.2f} s, not {least} to {most}"]
        last = self.seen[-1] if self.seen else None
        for name, value in expected.get("body", {}).items():
            got = last.body.get(name) if last and isinstance(last.body, dict) else None
            found += [] if _fits(got, value) else [f"{name} in the body: {got!r}, not {value!r}"]
        for name, value in expected.get("headers", {}).items():
            got = last.headers.get(name.lower()) if last else None
            found += [] if got == value else [f"header {name}: {got!r}, not {value!r}"]
        if (most := expected.get("stalled_within")) is not None and (self.stalled_at is None or self.stalled_at > most):
            found.append(f"the client went on reading: it stalled at {self.stalled_at}, not within {most} bytes")
        return found


def _fits(got: Any, value: Any) -> bool:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(one, int | float) for one in value):
        return isinstance(got, int | float) and value[0] <= got <= value[1]
    return bool(got == value)


class Scripted:
    def __init__(self) -> None:
        files = sorted(VECTORS.glob("*.json"))
        self._vectors = {one["name"]: one for file in files for one in json.loads(file.read_text())}
        self._runs: dict[str, Run] = {}
        self._connections = itertools.count()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self._connections)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        writer.transport.set_write_buffer_limits(high=0)
        # It is cancelled at the end, of which asyncio's streams of Python 3.10 and 3.11 complain.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while (request := await _request(reader)) and await self._answer(*request, number, reader, writer):
                pass
        writer.close()

    async def _answer(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: Any,
        number: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Whether the connection goes on."""
        if path == "/runs":
            return await _say(writer, self._began(body["vector"]))
        _, _, name, rest = path.split("/", 3)
        run = self._runs[name]
        if rest == "verdict":
            return await _say(writer, {"faults": await _verdict(run)})
        run.seen.append(Seen(time.monotonic(), number, f"/{rest}", headers, body))
        exchanges = run.vector["server"]
        exchange = exchanges[min(len(run.seen), len(exchanges)) - 1]
        run.playing += 1
        try:
            return await self._play(run, exchange, f"{self.url}/run/{name}/elsewhere", reader, writer)
        finally:
            run.playing -= 1

    def _began(self, vector: str) -> dict[str, str]:
        name = str(len(self._runs))
        self._runs[name] = Run(self._vectors[vector])
        return {"base_url": f"{self.url}/run/{name}"}

    async def _play(
        self,
        run: Run,
        exchange: dict[str, Any],
        elsewhere: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        if exchange.get("refuse"):
            return False
        api = run.vector["api"]
        whole = plays.body_of(exchange, api)
        writer.write(plays.head_of(exchange, elsewhere, None if whole is None else len(whole)) + (whole or b""))
        await writer.drain()
        if whole is not None:
            return True
        script = asyncio.ensure_future(_stream(run, exchange, api, writer))
        gone = _quietly(reader.read(1))  # nobody sends a second request before the first one's answer
        await asyncio.wait([script, gone], return_when=asyncio.FIRST_COMPLETED)
        if not script.done():
            run.cancelled = True
            script.cancel()
            return False
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await gone
        try:
            return await script
        except ConnectionError:
            run.cancelled = True
            return False


async def _stream(run: Run, exchange: dict[str, Any], api: str, writer: asyncio.StreamWriter) -> bool:
    for step in plays.steps_of(exchange, api):
        if isinstance(step, bytes):
            writer.write(f"{len(step):x}\r\n".encode() + step + b"\r\n")
            sending = _quietly(writer.drain())
            if (await asyncio.wait([sending], timeout=STALL))[1] and run.stalled_at is None:
                run.stalled_at = run.text
            await sending
            run.text += len(step)
        elif "pause" in step:
            await asyncio.sleep(step["pause"])
        elif step.get("silence"):
            await asyncio.sleep(3600)
        else:
            if step.get("reset"):
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            return False
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True


def _quietly(work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
    """As a task whose error nobody has to look at."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def _verdict(run: Run) -> list[str]:
    until = time.monotonic() + PATIENCE
    while (run.playing or run.faults()) and time.monotonic() < until:
        await asyncio.sleep(0.02)
    return run.faults() + (["an exchange has not ended"] if run.playing else [])


async def _request(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], Any] | None:
    """Method, path, headers and JSON of the next request; None at the connection's end."""
    line = await reader.readline()
    if not line:
        return None
    method, path, _ = line.decode().split(" ")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    return method, path, headers, json.loads(body) if body else None


async def _say(writer: asyncio.StreamWriter, value: Any) -> bool:
    body = json.dumps(value).encode()
    writer.write(plays.head_of({}, "", len(body)) + body)
    await writer.drain()
    return True


async def main() -> None:
    scripted = Scripted()
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    print(json.dumps({"url": scripted.url}), flush=True)
    async with server:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
