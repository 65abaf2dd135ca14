"""A stream to Triton for programs with threads: one thread reads it, and each request's own waits for its replies."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from tidewright_client.deadline import Deadline
from tidewright_client.errors import TidewrightError, UnexpectedAnswer
from tidewright_client.triton import wire
from tidewright_client.triton.exchange import END_PATIENCE, TICK, Exchange, Line, Step
from tidewright_client.triton.faults import broken_line
from tidewright_client.triton.reading import silence


class Carrier:
    """A stream, with a thread that reads it; gRPC's own thread asks for what is to be sent."""

    def __init__(self, address: str, open_call: Callable[[Iterator[Any]], Any], lock: threading.Lock) -> None:
        self.line = Line(time.monotonic())
        self._address, self._lock, self._over = address, lock, False
        # Its put is reentrant, so that also a destructor may call it.
        self.signals: queue.SimpleQueue[Exchange | None] = queue.SimpleQueue()
        self._end: threading.Timer | None = None
        self._call = open_call(self._requests())
        self.reader = threading.Thread(target=self._read, name="tidewright-triton", daemon=True)
        self.reader.start()

    def cancel(self) -> None:
        self._call.cancel()

    def _requests(self) -> Iterator[service_pb2.ModelInferRequest]:
        while not self._over:
            with self._lock:
                line, batch = self.line, list(self.line.outbox)
                line.outbox.clear()
                step = Step.GO_ON if batch else line.step(time.monotonic())
            yield from batch
            if step is Step.CLOSE:
                self._end = threading.Timer(END_PATIENCE, self.cancel)
                self._end.daemon = True
                self._end.start()
                return
            if step is Step.CANCEL:
                self.cancel()
                return
            if not batch:
                self._await_signal()

    def _await_signal(self) -> None:
        try:
            left = self.signals.get(timeout=TICK)
        except queue.Empty:
            return
        if left:
            with self._lock:
                self.line.leave(left, time.monotonic())

    def _read(self) -> None:
        error: TidewrightError | None = None
        try:
            for response in self._call:
                with self._lock:
                    self.line.hear(response, time.monotonic())
                    is_done = self.line.is_done
                if is_done:
                    self.signals.put(None)
        except grpc.RpcError as broken:
            error = broken_line(self._address, broken.code(), broken.details() or "")
        except Exception as broken:  # whoever waits for an answer must hear of it
            error = UnexpectedAnswer(f"the stream of {self._address} can't be read: {broken!r}")
            self.cancel()
        with self._lock:
            self._over = True
            self.line.broke(error)
        self.signals.put(None)
        if self._end:
            self._end.cancel()


class Call:
    """An exchange on its stream, as one thread reads it."""

    def __init__(self, carrier: Carrier, lock: threading.Lock, idle_timeout: float | None) -> None:
        self._carrier, self._lock, self._idle_timeout = carrier, lock, idle_timeout
        self._changed = threading.Condition(lock)
        self.exchange: Exchange

    def wake(self) -> None:
        """With the lock held."""
        self._changed.notify_all()

    def read(self, deadline: Deadline) -> wire.Reply | None:
        """The next reply; None after the last. Raises TidewrightError."""
        with self._changed:
            exchange = self.exchange
            if not self._changed.wait_for(lambda: exchange.has_news, deadline.at_most(self._idle_timeout)):
                self._carrier.line.silent(exchange, time.monotonic())
                self._carrier.signals.put(None)
                raise silence(exchange.has_begun, deadline, self._idle_timeout)
            return exchange.next()

    def leave(self) -> None:
        with self._lock:
            self._carrier.line.leave(self.exchange, time.monotonic())
        self._carrier.signals.put(None)

    def drop(self) -> None:
        """As `leave`, from a destructor, which must not wait for a lock."""
        self._carrier.signals.put(self.exchange)
