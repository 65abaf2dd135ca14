"""The two transports: each makes the attempts of a call by httpx until one is answered, and reads that answer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from tidewright_client.call import DRAIN_TIME, MAX_ERROR_BYTES, Call, Reader, Whole
from tidewright_client.deadline import Deadline
from tidewright_client.errors import InvalidRequest

if TYPE_CHECKING:
    from typing_extensions import Self

FAILURES = (httpx.HTTPError, TimeoutError)
"""Of a connection."""
LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100, keepalive_expiry=30)


def closed() -> InvalidRequest:
    return InvalidRequest("the client is closed")


class Exchange:
    answer: Whole | Reader
    """To be fed what `read` gives."""

    def __init__(self, http: httpx.Client, call: Call) -> None:
        """Raises TidewrightError."""
        self._call = call
        while (wait := self._attempt(http)) is not None:
            time.sleep(wait)

    def _attempt(self, http: httpx.Client) -> float | None:
        """None if it is answered, else seconds before the next."""
        call = self._call
        request = _request(http, call)
        with contextlib.ExitStack() as stack:
            try:
                with _current.bound(call):
                    response = stack.enter_context(contextlib.closing(http.send(request, stream=True)))
                _bound_reads(response)
                self._chunks = response.iter_raw()
                if response.status_code < 300:
                    self.answer = call.begin(response.status_code, response.headers)
                    self._first = self._next()
                    self._close = stack.pop_all().close
                    return None
                body = b""
                with contextlib.suppress(*FAILURES):  # its status stands
                    while len(body) < MAX_ERROR_BYTES and (chunk := self._next()):
                        body += chunk
            except FAILURES as error:
                return call.failed(error)
        return call.refused(response.status_code, response.headers, body)

    def read(self) -> bytes:
        """The next bytes, none at the end. Raises one of FAILURES."""
        first, self._first = self._first, b""
        return first or self._next()

    def _next(self) -> bytes:
        with _current.bound(self._call):
            return next(self._chunks, b"")

    def drain(self) -> None:
        """Reads to the end of the body, so that the connection can be used again; not for long."""
        self._call.deadline = Deadline(DRAIN_TIME, time.monotonic)
        with contextlib.suppress(*FAILURES):
            while self._next() and not self._call.deadline.is_over:
                pass

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncExchange:
    answer: Whole | Reader
    """To be fed what `read` gives."""

    def __init__(self, call: Call) -> None:
        """By `open`."""
        self._call = call

    @classmethod
    async def open(cls, http: httpx.AsyncClient, call: Call) -> Self:
        """Raises TidewrightError."""
        exchange = cls(call)
        while (wait := await exchange._attempt(http)) is not None:
            await anyio.sleep(wait)
        return exchange

    async def _attempt(self, http: httpx.AsyncClient) -> float | None:
        """None if it is answered, else seconds before the next."""
        call = self._call
        request = _request(http, call)
        async with contextlib.AsyncExitStack() as stack:
            try:
                with anyio.fail_after(call.deadline.at_most(None)):
                    response = await http.send(request, stream=True)
                stack.push_async_callback(response.aclose)
                self._chunks = response.aiter_raw()
                if response.status_code < 300:
                    self.answer = call.begin(response.status_code, response.headers)
                    self._first = await self._next()
                    self._close = stack.pop_all().aclose
                    return None
                body = b""
                with contextlib.suppress(*FAILURES):  # its status stands
                    while len(body) < MAX_ERROR_BYTES and (chunk := await self._next()):
                        body += chunk
            except FAILURES as error:
                return call.failed(error)
        return call.refused(response.status_code, response.headers, body)

    async def read(self) -> bytes:
        """The next bytes, none at the end. Raises one of FAILURES."""
        first, self._first = self._first, b""
        return first or await self._next()

    async def _next(self) -> bytes:
        with anyio.fail_after(self._call.deadline.at_most(self._call.patience)):
            return await anext(self._chunks, b"")

    async def drain(self) -> None:
        """Reads to the end of the body, so that the connection can be used again; not for long."""
        self._call.deadline = Deadline(DRAIN_TIME, time.monotonic)
        with contextlib.suppress(*FAILURES):
            while await self._next() and not self._call.deadline.is_over:
                pass

    async def aclose(self) -> None:
        await self._close()

    def drop(self) -> None:
        """Closes it soon, if that is possible outside a coroutine."""
        with contextlib.suppress(RuntimeError):  # no asyncio loop runs here
            task = asyncio.get_running_loop().create_task(self.aclose())
            _dropped.add(task)
            task.add_done_callback(_dropped.discard)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


_dropped: set[asyncio.Task[None]] = set()  # a loop keeps no reference to its tasks


def _request(http: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
    """Of the next attempt. Raises TidewrightError."""
    if http.is_closed:
        raise call.end(closed())
    attempt = call.attempt()
    return http.build_request(
        attempt.method,
        attempt.url,
        headers=attempt.headers,
        content=attempt.content,
        extensions={"timeout": attempt.timeouts},
    )


class _Current(threading.local):
    """The call for which this thread reads from a connection."""

    call: Call | None = None

    @contextlib.contextmanager
    def bound(self, call: Call) -> Iterator[None]:
        self.call, before = call, self.call
        try:
            yield
        finally:
            self.call = before


_current = _Current()


def _bound_reads(response: httpx.Response) -> None:
    """From here on, no read of its connection takes longer than the deadline of the call that reads.

    httpx takes the time for a read once, at the beginning of an answer, whatever is left of it later.
    """
    stream: Any = response.extensions.get("network_stream")
    if stream is None or "read" in getattr(stream, "__dict__", {"read": None}):
        return
    read = stream.read

    def bounded(max_bytes: int, timeout: float | None = None) -> bytes:
        call = _current.call
        made: bytes = read(max_bytes, timeout=call.deadline.at_most(timeout) if call else timeout)
        return made

    stream.read = bounded
