"""What a client may do to its connection: how long its request may take, how long its headers may be, how long it may
leave unread what it is sent. uvicorn itself would wait for ever. What HTTP/1.0 lacks, and how connections end with the
process.

In the protocol, where it costs a request two timers, and where a request is seen before it is one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tidewright_gateway.http import access_log
from tidewright_gateway.http.middleware import REFUSAL
from tidewright_gateway.openai.errors import ApiError

MAX_HEADERS = 64 * 1024  # bytes, of the address and all headers
LAST_REQUEST_WAIT = 1.0  # seconds; longer than a request takes from any client


class PatientProtocol(HttpToolsProtocol):
    """For a time only, which the process sets for all its connections; uvicorn makes them, and has no such options."""

    open_connections = 0
    refused: Callable[[], None] = staticmethod(lambda: None)
    """Is called for each connection that is refused."""
    going_away: Callable[[], None] = staticmethod(lambda: None)
    """Is called when the process begins to end, for each of its connections (also by websocket/server.py)."""

    max_connections = 10_000
    read_timeout = 30.0  # seconds
    send_timeout = 60.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._read_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._in_headers = False
        self._unparsed = self._header_bytes = 0
        self._why = ""  # a request that can be parsed is refused
        self._going_away = False
        self._began_at = 0.0  # when the request began, or the connection (the loop's clock)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._began_at = self.loop.time()
        self._start_reading()
        PatientProtocol.open_connections += 1
        if len(self.connections) > self.max_connections:
            PatientProtocol.refused()
            message = f"{self.max_connections} connections are open (max_connections); try again later"
            self._refuse(ApiError(503, message, code="too_many_connections", retry_after=1, limit="max_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading()
        self._stop_writing()
        PatientProtocol.open_connections -= 1
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._read_timer is None:  # even if it is an empty line only: uvicorn stops its own timer for it
            self._start_reading()
        super().data_received(data)
        if self._in_headers:
            self._unparsed += len(data)
            if self._unparsed > MAX_HEADERS:
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._began_at = self.loop.time()
        self._unparsed = self._header_bytes = 0
        self._start_reading()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._why = f"an HTTP/1.1 request has one Host header; this one has {hosts}"
            raise ValueError(self._why)  # see _count
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_reading()
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        """Each request passes here, a pipelined one once its turn comes."""
        if self._going_away:
            cycle.keep_alive = False  # and its response says so
        super()._start_asgi_task(cycle, _Http10(cycle, app) if cycle.scope["http_version"] == "1.0" else app)  # type: ignore[arg-type]

    def shutdown(self) -> None:
        """The next response says that its connection ends. Without a next request, it ends after a while.

        uvicorn closes connections between two requests at once, and a request that is on its way then is lost.
        """
        self._going_away = True
        PatientProtocol.going_away()
        if self._is_idle:
            self._await_last_request()
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._going_away:
            self._await_last_request()

    @property
    def _is_idle(self) -> bool:
        return (self.cycle is None or self.cycle.response_complete) and not self._in_headers

    def _await_last_request(self) -> None:
        self.loop.call_later(LAST_REQUEST_WAIT, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self._is_idle:
            self.transport.close()

    def handle_websocket_upgrade(self) -> None:
        self._stop_reading()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Also uvicorn's own way to refuse what it can't parse."""
        if max(self._unparsed, self._header_bytes) > MAX_HEADERS:
            self._refuse(ApiError(431, f"the headers are longer than {MAX_HEADERS} bytes", code="headers_too_large"))
        else:
            self._refuse(ApiError(400, self._why or "invalid HTTP request", code="invalid_http"))

    def _count(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > MAX_HEADERS:
            raise ValueError("too long")  # which the parser makes an error of its own, and uvicorn a refusal

    def _start_reading(self) -> None:
        self._stop_reading()
        self._read_timer = self.loop.call_later(self.read_timeout, self._read_too_long)

    def _read_too_long(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and (self.flow.read_paused or not self.cycle.more_body):
            self._start_reading()  # not the client is slow: it is being answered, or what it sent is not being read
        elif answering and not self.cycle.response_started:
            message = f"the body did not arrive within {self.read_timeout:g} s (read_timeout)"
            error = ApiError(408, message, code="timeout", may_retry=False)
            self.cycle.scope[REFUSAL] = error  # type: ignore[literal-required] # for its access log
            self._answer(error)
        else:
            self.transport.close()

    def _stop_reading(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _stop_writing(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _refuse(self, error: ApiError) -> None:
        """What is no request yet, so that nobody else logs it."""
        if self.transport.is_closing():
            return  # refused before
        url = self.url.partition(b"?")[0].decode("latin-1") if self._in_headers else ""
        client = access_log.address_of(self.client)
        request_id = secrets.token_hex(12)
        access_log.write_refused(client, "", url, error, self.loop.time() - self._began_at, request_id=request_id)
        self._answer(error, request_id)

    def _answer(self, error: ApiError, request_id: str = "") -> None:
        headers = {**error.headers, "Content-Length": str(len(error.body)), "Connection": "close"}
        if request_id:
            headers["X-Request-Id"] = request_id
        head = "".join(f"{name.lower()}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + error.body)
        self.transport.close()


class _Http10:
    """HTTP/1.0 has neither chunked encoding nor 100 Continue; uvicorn sends both all the same.

    A response without a length ends with its connection instead, which uvicorn closes after each HTTP/1.0 response.
    """

    def __init__(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        self._cycle, self._app = cycle, app
        self._has_length = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._cycle.waiting_for_100_continue = False
        await self._app(scope, receive, self._send)

    async def _send(self, message: Message) -> None:
        cycle = self._cycle
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not self._has_length:
                cycle.chunked_encoding = False  # None, and uvicorn chooses it
        elif not self._has_length:
            # uvicorn waits before it compares lengths; here, so that no other message comes between.
            while cycle.flow.write_paused and not cycle.disconnected:
                await cycle.flow.drain()
            cycle.expected_content_length = len(message.get("body", b""))
        await cycle.send(message)  # type: ignore[arg-type]
