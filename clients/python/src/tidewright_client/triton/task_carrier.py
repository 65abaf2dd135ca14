"""A stream to Triton for asyncio: one task reads it, and each request's own waits for its replies."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2

from tidewright_client.deadline import Deadline
from tidewright_client.errors import TidewrightError, UnexpectedAnswer
from tidewright_client.triton import calls, wire
from tidewright_client.triton.exchange import END_PATIENCE, TICK, Exchange, Line, Step
from tidewright_client.triton.faults import broken_line
from tidewright_client.triton.reading import silence


class Carrier:
    """A stream, and the task that reads it."""

    def __init__(self, address: str, open_call: Callable[[AsyncIterator[Any]], Any]) -> None:
        self.line = Line(time.monotonic())
        self._address = address
        self.signal = asyncio.Event()
        self._call = open_call(self._requests())
        self.reader = asyncio.get_running_loop().create_task(self._read())

    def cancel(self) -> None:
        self._call.cancel()

    async def _requests(self) -> AsyncIterator[service_pb2.ModelInferRequest]:
        while True:
            self.signal.clear()
            batch = list(self.line.outbox)
            self.line.outbox.clear()
            step = Step.GO_ON if batch else self.line.step(time.monotonic())
            for request in batch:
                yield request
            if step is Step.CLOSE:
                asyncio.get_running_loop().call_later(END_PATIENCE, self.cancel)
                return
            if step is Step.CANCEL:
                self.cancel()
                return
            if not batch:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.signal.wait(), TICK)

    async def _read(self) -> None:
        error: TidewrightError | None = None
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self.line.hear(response, time.monotonic())
                if self.line.is_done:
                    self.signal.set()
        except grpc.aio.AioRpcError as broken:
            error = broken_line(self._address, broken.code(), broken.details() or "")
        except asyncio.CancelledError:  # of the call by `cancel`, or of this task with the loop
            error = calls.closed()
        except Exception as broken:  # whoever waits for an answer must hear of it
            error = UnexpectedAnswer(f"the stream of {self._address} can't be read: {broken!r}")
            self.cancel()
        self.line.broke(error)


class Call:
    """An exchange on its stream, as one task reads it."""

    def __init__(self, carrier: Carrier, idle_timeout: float | None) -> None:
        self._carrier, self._idle_timeout = carrier, idle_timeout
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[None] | None = None
        self.exchange: Exchange

    def wake(self) -> None:
        if self._news and not self._news.done():
            self._news.set_result(None)

    async def read(self, deadline: Deadline) -> wire.Reply | None:
        """The next reply; None after the last. Raises TidewrightError."""
        exchange = self.exchange
        if not exchange.has_news:
            self._news = self._loop.create_future()
            limit = deadline.at_most(self._idle_timeout)
            timer = None if limit is None else self._loop.call_later(limit, self.wake)
            try:
                await self._news
            finally:
                if timer:
                    timer.cancel()
            if not exchange.has_news:
                self._carrier.line.silent(exchange, time.monotonic())
                self._carrier.signal.set()
                raise silence(exchange.has_begun, deadline, self._idle_timeout)
        return exchange.next()

    def leave(self) -> None:
        self._carrier.line.leave(self.exchange, time.monotonic())
        self._carrier.signal.set()

    def drop(self) -> None:
        """As `leave`, from a destructor, which may run in any thread and after the loop's end."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.leave)
