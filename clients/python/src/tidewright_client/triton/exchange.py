"""One request from its first to its last response, and many of them over one stream. No I/O, no clock, no locks.

A transport calls each object from one thread at a time: the asyncio client from its loop, the other under a lock.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from enum import Enum

from tritonclient.grpc import service_pb2

from tidewright_client.errors import ASK_AGAIN, ConnectionFailed, Interrupted, TidewrightError, UnexpectedAnswer
from tidewright_client.triton import wire
from tidewright_client.triton.faults import error_of
from tidewright_client.triton.wire import Reply

LINGER = 1.0
"""Seconds without a request after which a stream is closed: an open one keeps Triton from unloading its models."""
MAX_AGE = 60.0
"""Seconds after which a stream takes no further requests, for the same reason."""
END_PATIENCE = 10.0
"""Seconds that a cancelled request, and a closed stream, may take to end."""
TICK = 1.0
"""Seconds between two looks at a stream that has nothing to send."""


class Exchange:
    """One request: the replies that came and were not read, and how it ended."""

    def __init__(self, request_id: str, model: str, max_buffer: int, wake: Callable[[], None]) -> None:
        """`max_buffer`: bytes of replies that may wait for the reader. `wake`: called when there is news for it."""
        self.request_id, self.model = request_id, model
        self._max_buffer, self._wake = max_buffer, wake
        self._replies: collections.deque[Reply] = collections.deque()
        self._buffered = 0
        self.error: TidewrightError | None = None
        self.has_begun = False
        self.is_over = False
        """Triton has nothing more to say of it."""
        self.is_left_at: float | None = None
        """When its reader went, before the end."""
        self.heard_at = 0.0

    @property
    def has_news(self) -> bool:
        return bool(self._replies) or self.error is not None or self.is_over

    def next(self) -> Reply | None:
        """The next reply; None after the last. Call it only if there is news. Raises the error that ended it."""
        if self._replies:
            reply = self._replies.popleft()
            self._buffered -= reply.num_bytes
            return reply
        if self.error is not None:
            raise self.error
        return None

    def take(self, reply: Reply, now: float) -> bool:
        """False: its reader is too slow, so that it has to be cancelled."""
        self.heard_at = now
        self.is_over = self.is_over or reply.is_final
        if self.is_left_at is not None or self.error is not None:
            return True
        if reply.error:
            self.fail(error_of(reply.error, self.request_id))
            return True
        if reply.outputs:
            self.has_begun = True
            self._replies.append(reply)
            self._buffered += reply.num_bytes
        if self._buffered > self._max_buffer:
            text = f"more than {self._max_buffer} bytes of the answer waited to be read; read faster, or ask for less"
            self.fail(Interrupted(text, request_id=self.request_id))
            return self.is_over
        self._wake()
        return True

    def fail(self, error: TidewrightError) -> None:
        """It ends with this error, unless it has ended."""
        if self.error is None:
            self.error = error
            self._wake()

    def lost(self, error: TidewrightError) -> None:
        """Its stream broke."""
        self.is_over = True
        if self.has_begun:
            error = Interrupted(f"the answer was cut off: {error.message}; {ASK_AGAIN}", request_id=self.request_id)
        else:
            error = type(error)(error.message, request_id=self.request_id)
        self.fail(error)


class Step(Enum):
    """What a transport does with its stream."""

    GO_ON = "go on"
    CLOSE = "close"
    """Send nothing more, and read it to its end."""
    CANCEL = "cancel"


class Line:
    """The requests over one stream."""

    def __init__(self, now: float) -> None:
        self._born = self._used_at = now
        self._exchanges: dict[str, Exchange] = {}
        self.outbox: collections.deque[service_pb2.ModelInferRequest] = collections.deque()
        self.takes_requests = True
        self._serials = itertools.count(1)

    @property
    def is_empty(self) -> bool:
        return not self._exchanges and not self.outbox

    @property
    def is_done(self) -> bool:
        """It can be closed."""
        return self.is_empty and not self.takes_requests

    def has(self, request_id: str) -> bool:
        return request_id in self._exchanges

    def begin(self, exchange: Exchange, request: service_pb2.ModelInferRequest, now: float) -> None:
        exchange.heard_at = now
        self._exchanges[exchange.request_id] = exchange
        self.outbox.append(request)

    def leave(self, exchange: Exchange, now: float) -> None:
        """Its reader goes. Triton is told to cancel it, unless it has ended."""
        if exchange.is_left_at is not None or exchange.request_id not in self._exchanges:
            return
        exchange.is_left_at = now
        # Triton's own cancel would end the whole stream.
        own_id = f"{exchange.request_id}.cancel{next(self._serials)}"
        word = wire.control_input(f"cancel:{exchange.request_id}")
        cancel = Exchange(own_id, exchange.model, 0, lambda: None)
        cancel.is_left_at = now
        self.begin(cancel, wire.request_of(exchange.model, own_id, word), now)

    def hear(self, response: service_pb2.ModelStreamInferResponse, now: float) -> None:
        self._used_at = now
        reply = wire.reply_of(response)
        exchange = self._exchanges.get(reply.request_id)
        if exchange is None:
            if reply.error and not reply.request_id:
                # Triton does not say whose error it is: none may wait for ever.
                self.broke(UnexpectedAnswer(f"Triton sent an error without a request's id: {reply.error}"))
            return  # else: the rest of one that was given up
        if not exchange.take(reply, now):
            self.leave(exchange, now)
        if exchange.is_over:
            del self._exchanges[reply.request_id]

    def broke(self, error: TidewrightError | None) -> None:
        """The stream is over; None: as it should be."""
        self.takes_requests = False
        self.outbox.clear()
        lost, self._exchanges = list(self._exchanges.values()), {}
        for exchange in lost:
            exchange.lost(error or ConnectionFailed("Triton ended the stream; is it shutting down?"))

    def close(self) -> None:
        """No further requests; those that run are cancelled by `leave`."""
        self.takes_requests = False

    def silent(self, exchange: Exchange, now: float) -> None:
        """The exchange gave its reader nothing for too long. If no other did, the connection may be dead."""
        if self._used_at <= exchange.heard_at:
            self.takes_requests = False
        self.leave(exchange, now)

    def step(self, now: float) -> Step:
        """What to do when there is nothing to send."""
        if not self._exchanges:
            if now - self._used_at >= LINGER or now - self._born >= MAX_AGE:
                self.takes_requests = False
            return Step.GO_ON if self.takes_requests else Step.CLOSE
        if now - self._born >= MAX_AGE:
            self.takes_requests = False
        left = [one.is_left_at for one in self._exchanges.values() if one.is_left_at is not None]
        if any(at < now - END_PATIENCE for at in left):
            self.takes_requests = False
            if len(left) == len(self._exchanges):
                return Step.CANCEL
        return Step.GO_ON

    @property
    def exchanges(self) -> list[Exchange]:
        return list(self._exchanges.values())
