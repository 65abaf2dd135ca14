"""Costly requests on their way in: a few threads tokenize and check them, not Triton's one that brings all requests.

A long text or a grammar takes up to a tenth of a second or more. Triton's thread must stay free for the questions of
probes, cancels, and requests that cost nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tidewright.bridge.active_request import Origin
from tidewright.errors import CancelledError, EngineUnavailableError, OverloadedError, RequestError
from tidewright.schema import attempt_of

log = logging.getLogger(__name__)

THREADS = 2
JOIN_TIMEOUT = 2.0  # seconds
QUICK_BYTES = 4096  # of input: checked in a few milliseconds
MAX_QUEUED_BYTES = 1 << 28  # of all requests that wait here
_COSTLY = (b"guided_", b"structured_outputs")  # grammars take long to check, however short they are


@dataclass(eq=False)
class Arrival:
    """What Triton brought. Its tensors are copies: Triton takes its memory back."""

    tensors: dict[str, np.ndarray]
    parameters: str  # JSON
    client_id: str
    sender: object
    origin: Origin | None = None
    arrived_at: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    @property
    def num_bytes(self) -> int:
        sizes = (
            sum(map(len, values.reshape(-1))) if values.dtype == np.object_ else values.nbytes
            for values in self.tensors.values()
        )
        return sum(sizes) + len(self.parameters)

    @property
    def is_quick(self) -> bool:
        options = self.tensors.get("sampling_parameters")
        texts = [self.parameters.encode(), *([] if options is None else options.reshape(-1))]
        return self.num_bytes <= QUICK_BYTES and not any(word in text for text in texts for word in _COSTLY)


class Intake:
    """Every arrival ends exactly once: in `take`, or, when it is cancelled or the server ends before, in `refuse`."""

    def __init__(
        self, take: Callable[[Arrival], None], refuse: Callable[[Arrival, RequestError], None], limit: int
    ) -> None:
        """`limit`: of the requests that wait here. Neither function may raise."""
        self._take, self._refuse, self._limit = take, refuse, limit
        self._queue: deque[Arrival] = deque()
        self._queued_bytes = 0
        self._working: set[Arrival] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._threads = [threading.Thread(target=self._loop, name="intake", daemon=True) for _ in range(THREADS)]

    @property
    def active(self) -> int:
        return len(self._queue) + len(self._working)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Requests that are being checked are taken; those that wait for it are refused."""
        with self._changed:
            self._stopping = True
            waiting = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for arrival in waiting:
            self._refuse(arrival, EngineUnavailableError("the server is shutting down"))
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT)

    def put(self, arrival: Arrival) -> None:
        """Raises OverloadedError: too much waits here already."""
        size = arrival.num_bytes
        with self._changed:
            if self._stopping:
                raise EngineUnavailableError("the server is shutting down")
            if len(self._queue) >= self._limit or self._queued_bytes + size > MAX_QUEUED_BYTES:
                raise OverloadedError(
                    f"{len(self._queue)} requests with {self._queued_bytes} bytes wait to be read; try again later"
                )
            self._queue.append(arrival)
            self._queued_bytes += size
            self._changed.notify()

    def cancel(self, client_id: str) -> int:
        """End the requests of that id that are here; how many."""
        with self._changed:
            waiting = [arrival for arrival in self._queue if attempt_of(arrival.client_id, client_id)]
            for arrival in waiting:
                self._queue.remove(arrival)
                self._queued_bytes -= arrival.num_bytes
            in_work = [arrival for arrival in self._working if attempt_of(arrival.client_id, client_id)]
            for arrival in in_work:
                arrival.cancelled = True
        for arrival in waiting:
            self._refuse(arrival, CancelledError("cancelled by its id"))
        return len(waiting) + len(in_work)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if not self._queue:
                    return
                arrival = self._queue.popleft()
                self._queued_bytes -= arrival.num_bytes
                self._working.add(arrival)
            try:
                self._take(arrival)
            except Exception:
                log.exception("a request could not be taken")
            with self._changed:
                self._working.discard(arrival)
