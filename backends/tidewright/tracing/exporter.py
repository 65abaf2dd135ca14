"""Exports traces in its own thread, from a bounded queue. What can't be exported in time is dropped and counted.

They are encoded before they are queued: bytes take little memory, and the garbage collector does not look at them.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Literal, get_args

from tidewright.tracing.endpoint import Endpoint, ExportError, open_endpoint
from tidewright.tracing.environment import read_environment
from tidewright.tracing.otlp import Encoded, encode, request_of, to_json_lines
from tidewright.tracing.span import Span, Trace

log = logging.getLogger(__name__)

MAX_QUEUED = 2048  # traces that wait; one more is dropped
MAX_BATCH = 256  # traces in one request
DELAY = 1.0  # seconds that a trace waits for others, at most
WARN_INTERVAL = 60.0  # seconds between two warnings that nothing can be exported

Drop = Literal["queue_full", "export_failed"]
DROPS: tuple[Drop, ...] = get_args(Drop)


class Pending(ABC):
    """A trace that is to be exported; its spans are made only if there is room for it."""

    trace_id: str
    num_spans: int

    @abstractmethod
    def spans(self) -> list[Span]: ...


class Exporter:
    def __init__(self, endpoint: str, exported: Callable[[int], None], dropped: Callable[[Drop, int], None]) -> None:
        """`exported` and `dropped` count spans, and are called from several threads.

        Raises:
            ValueError: the endpoint can't be used.
        """
        self._endpoint: Endpoint = open_endpoint(endpoint)
        self._resource = read_environment().resource
        self._exported, self._dropped = exported, dropped
        self._queue: deque[tuple[int, Encoded]] = deque()  # how many spans, and these
        self._changed = threading.Condition()
        self._stopping = self._is_full = False
        self._warned_at = -WARN_INTERVAL
        self._thread = threading.Thread(target=self._loop, name="traces", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, trace: Pending) -> None:
        """Never blocks on the endpoint."""
        # Without the lock: a deque is safe, and the thread looks by itself in time.
        if len(self._queue) >= MAX_QUEUED:
            self._dropped("queue_full", trace.num_spans)
            return
        try:
            made = Trace(trace.trace_id, trace.spans())
            self._queue.append((len(made.spans), self._encode(made)))
        except Exception as error:  # a mistake of ours must not harm the request
            log.exception("spans could not be encoded")
            self._failed(repr(error), trace.num_spans)
            return
        if len(self._queue) >= MAX_BATCH and not self._is_full:
            with self._changed:
                self._is_full = True
                self._changed.notify()

    def stop(self, timeout: float) -> None:
        """Exports what waits, as far as that takes no longer than `timeout` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    def _encode(self, trace: Trace) -> Encoded:
        return (("", to_json_lines([trace], self._resource)),) if self._endpoint.is_file else encode(trace)

    def _loop(self) -> None:
        while batch := self._next():
            count, encoded = sum(count for count, _ in batch), (trace for _, trace in batch)
            try:
                if self._endpoint.is_file:
                    self._endpoint.send(b"".join(lines for trace in encoded for _, lines in trace))
                else:
                    self._endpoint.send(request_of(encoded, self._resource))
                self._exported(count)
            except ExportError as error:
                self._failed(str(error), count)
            except Exception as error:  # nor end the thread
                log.exception("spans could not be exported")
                self._failed(repr(error), count)
        self._endpoint.close()

    def _next(self) -> list[tuple[int, Encoded]]:
        """The next batch; empty once it is stopped and nothing is left."""
        while True:
            with self._changed:
                if len(self._queue) < MAX_BATCH:
                    self._is_full = False
                    self._changed.wait_for(lambda: self._is_full or self._stopping, DELAY)
                if self._queue or self._stopping:
                    return [self._queue.popleft() for _ in range(min(len(self._queue), MAX_BATCH))]

    def _failed(self, why: str, count: int) -> None:
        self._dropped("export_failed", count)
        if (now := time.monotonic()) - self._warned_at >= WARN_INTERVAL:
            self._warned_at = now
            log.warning("%d spans could not be exported: %s", count, why)
