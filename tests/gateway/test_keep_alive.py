"""Connections without a request: the client ends them, not the gateway under the client's next request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway.test_bad_clients import PATIENCE, connect, read_all, read_answer
from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from tidewright.bench.machine import free_ports
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http import connection as connection_module
from tidewright_gateway.http.connection import PatientProtocol
from tidewright_gateway.http.serving import _options

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

LONGEST_OF_OTHERS = 60.0  # seconds: AWS' load balancers and nginx; OpenAI's client has 5


def test_they_outlive_those_of_clients_and_proxies() -> None:
    assert _options(GatewaySettings())["timeout_keep_alive"] > LONGEST_OF_OTHERS


def test_they_end_at_last(model_dir: Path, echo: EchoReplica) -> None:
    with RunningGateway(model_dir, echo, keep_alive=1) as gateway, closing(connect(gateway)) as client:
        for _ in range(2):
            client.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert read_answer(client)[0] == 200
        assert read_all(client) == b""


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Two pieces; the second when the test allows it."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first ", "more_body": True})
    await scope["state"]["go_on"].wait()
    await send({"type": "http.response.body", "body": b"last"})


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[uvicorn.Server, asyncio.Event, Callable[[], Awaitable[Connection]]]]:
    """uvicorn with the gateway's protocol: itself, what lets answers end, and what opens a connection."""
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["go_on"] = go_on
        await _answer(scope, receive, send)

    (port,) = free_ports(1)
    config = uvicorn.Config(app, port=port, http=PatientProtocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server, go_on, lambda: asyncio.open_connection("127.0.0.1", port)
    server.should_exit = True
    await task


async def closes_its_port(server: uvicorn.Server) -> None:
    server.should_exit = True
    while any(one.is_serving() for one in server.servers):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0)  # what comes right after that


def ask(connection: Connection) -> None:
    connection[1].write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")


async def head(connection: Connection) -> str:
    return (await connection[0].readuntil(b"\r\n\r\n")).decode()


def test_a_request_that_comes_as_the_gateway_ends_is_the_last_of_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_module, "LAST_REQUEST_WAIT", 3600)

    async def run() -> None:
        async with serving() as (server, go_on, connect):
            fresh, used, busy = [await connect() for _ in range(3)]
            ask(used)
            ask(busy)
            go_on.set()
            assert "close" not in await head(used)
            await used[0].readuntil(b"last\r\n0\r\n\r\n")
            await head(busy)
            await busy[0].readuntil(b"last\r\n0\r\n\r\n")
            go_on.clear()
            ask(busy)
            assert "close" not in await head(busy)
            await closes_its_port(server)
            go_on.set()
            await busy[0].readuntil(b"last\r\n0\r\n\r\n")  # begun before, and kept, as its head said
            for connection in (fresh, used, busy):
                ask(connection)
                assert "connection: close" in await head(connection)
                assert (await connection[0].read()).endswith(b"last\r\n0\r\n\r\n")

    asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_a_connection_without_a_further_request_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "LAST_REQUEST_WAIT", 0.01)

    async def run() -> None:
        async with serving() as (_, go_on, connect):
            go_on.set()
            fresh, used = await connect(), await connect()
            ask(used)
            await used[0].readuntil(b"last\r\n0\r\n\r\n")
        assert await fresh[0].read() == await used[0].read() == b""

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
