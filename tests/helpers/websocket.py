"""A client of /v1/stream, and a gateway's WebSocket before a backend that answers by a script."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tidewright.bench.machine import free_ports
from tidewright_gateway.auth.callers import ANONYMOUS, Caller
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http.hosts import Hosts
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.parsing import parse
from tidewright_gateway.openai.protocol import CompletionRequest
from tidewright_gateway.replicas.triton import Reply
from tidewright_gateway.websocket.backend import Kind
from tidewright_gateway.websocket.hub import Hub
from tidewright_gateway.websocket.routes import make_stream_router
from tidewright_gateway.websocket.server import uvicorn_options

TIMEOUT = 60  # seconds without a message: something hangs


class StreamClient:
    """One connection."""

    def __init__(self, url: str, opens: bool = True, token: str | None = None, **options: Any) -> None:
        address = url.replace("http", "ws", 1) + "/v1/stream"
        # With a queue that fills up, the library would not notice an end of the connection behind it.
        options = {"max_queue": None, **options}
        self.connection = connect(address, proxy=None, ping_interval=None, close_timeout=1, **options)
        self.resume_tokens: dict[str, str] = {}
        if opens:
            self.send("open", token=token)
            self.opened = self.receive("opened")

    def send(self, type: str, **fields: Any) -> None:
        self.connection.send(json.dumps({"type": type, **fields}))

    def receive(self, type: str | None = None) -> dict[str, Any]:
        message = json.loads(self.connection.recv(timeout=TIMEOUT))
        assert type in (None, message["type"]), message
        return message

    def start(self, id: str, credits: int | None = None, **request: Any) -> None:
        self.send("generate", id=id, request=request, credits=credits)
        self.resume_tokens[id] = self.receive("started")["resume_token"]

    def tokens(self, count: int) -> list[dict[str, Any]]:
        """The next token messages, until they have this many tokens."""
        messages: list[dict[str, Any]] = []
        while sum(len(message["token_ids"]) for message in messages) < count:
            messages.append(self.receive("token"))
        return messages

    def rest(self, ids: int = 1) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Token messages and `done` messages, until so many generations are done."""
        tokens, done = [], []
        while len(done) < ids:
            message = self.receive()
            (done if message["type"] == "done" else tokens).append(message)
        return tokens, done

    def until_closed(self) -> Iterator[str | bytes]:
        """All further messages."""
        with suppress(ConnectionClosed):
            while True:
                yield self.connection.recv(timeout=TIMEOUT)

    def drop(self) -> None:
        """The TCP connection breaks without a farewell."""
        self.connection.socket.shutdown(2)
        self.connection.close()

    def __enter__(self) -> StreamClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def text_of(tokens: list[dict[str, Any]]) -> str:
    return "".join(message["text"] for message in tokens)


def fruitless(url: str, resume_token: str) -> dict[str, Any]:
    """The error that a resume gets."""
    with StreamClient(url) as client:
        client.send("resume", id="x", resume_token=resume_token)
        return client.receive("error")


@dataclass
class _Scripted:
    replies: AsyncGenerator[tuple[int, Reply], None]
    num_choices: int = 1
    usage_prompt: int = 3
    served_by: str = "script"
    limited_by: str | None = None


class ScriptedBackend:
    """`max_tokens` tokens "0 1 2 ... ", or without it one each millisecond for ever. A token is its caller's key."""

    def __init__(self) -> None:
        self.running = 0
        self.revoked: set[str] = set()

    async def authenticate(self, credential: str | None) -> Caller:
        token = (credential or "").removeprefix("Bearer ")
        if token in ("wrong", *self.revoked):
            raise ApiError(401, "no such key", code="invalid_api_key")
        return Caller(token) if token else ANONYMOUS

    @asynccontextmanager
    async def run(self, kind: Kind, body: bytes, credential: str | None, request_id: str) -> AsyncIterator[_Scripted]:
        await self.authenticate(credential)
        request = parse(kind, body, 8192)
        assert isinstance(request, CompletionRequest)
        if request.prompt == "refused":
            raise ApiError(429, "too much", code="rate_limited", retry_after=2.5)
        limited_by = "tokens_per_minute" if request.prompt == "limited" else None
        yield _Scripted(self._replies(request), limited_by=limited_by)

    async def _replies(self, body: CompletionRequest) -> AsyncGenerator[tuple[int, Reply], None]:
        self.running += 1
        try:
            number = 0
            while body.max_tokens is None or number < body.max_tokens:
                await asyncio.sleep(0 if body.max_tokens else 0.001)
                text = f"{number} "
                yield 0, Reply(text.ljust(10_000) if body.prompt == "big" else text, [number], None, None)
                number += 1
            if body.prompt == "fails":
                raise RuntimeError("a fault in the gateway")
            yield 0, Reply("", [], "timeout" if body.prompt == "late" else "length", None)
        finally:
            self.running -= 1


class ScriptedGateway:
    """The endpoint in uvicorn, in a thread."""

    def __init__(self, **options: Any) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        settings = GatewaySettings(port=port, **options)
        self.backend, self.metrics, self.hub = ScriptedBackend(), Metrics(), Hub(settings)

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            self._loop = asyncio.get_running_loop()
            self.hub.start()
            yield
            await self.hub.stop()

        app = FastAPI(lifespan=lifespan)
        app.include_router(make_stream_router(settings, self.hub, self.backend, Hosts(settings), self.metrics))
        config = uvicorn.Config(
            app,
            port=port,
            **uvicorn_options(settings),
            log_level="critical",
            timeout_graceful_shutdown=10,
        )
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run)

    def wait(self, seconds: float = 30, **counts: int) -> None:
        """Until so many generations are `running` or `kept`, or so many `connections` or `sockets` open."""
        deadline = time.monotonic() + seconds
        while any(getattr(self, name) != count for name, count in counts.items()):
            assert time.monotonic() < deadline, {name: getattr(self, name) for name in counts}
            time.sleep(0.01)

    def sweep(self, later: float) -> None:
        """As if so many seconds had passed."""
        self._loop.call_soon_threadsafe(self.hub.sweep, time.monotonic() + later)

    @property
    def running(self) -> int:
        return self.backend.running

    @property
    def kept(self) -> int:
        return len(self.hub._kept)

    @property
    def sockets(self) -> int:
        return len(self.server.server_state.connections)

    @property
    def connections(self) -> int:
        return len(self.hub.connections)

    def __enter__(self) -> ScriptedGateway:
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
