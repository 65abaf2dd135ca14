"""Messages on their way to the bridge, sent by a thread of its own: no step waits for the socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from tidewright.engine.messages import EngineStats, Heartbeat, SequenceOutput, StepOutputs, ToBridge
from tidewright.engine.vital_thread import start_vital_thread

MAX_PENDING = 8192  # outputs; beyond it the engine waits, and its heartbeat stops


class Outbox:
    """Outputs in their order, then the newest heartbeat. What gathers while a send runs leaves as one message.

    A step may take longer than the bridge waits for a heartbeat. While it makes progress, the last one is repeated.

    A bridge that does not read stalls the engine only once `limit` outputs wait (and as many may be in the message
    that is being sent); it is the bridge's own supervision that then misses the heartbeat.
    """

    def __init__(self, send: Callable[[ToBridge], None], limit: int = MAX_PENDING) -> None:
        self._send = send
        self._limit = limit
        self._outputs: list[SequenceOutput] = []
        self._stats: EngineStats | None = None
        self._changed = threading.Condition()
        self._seconds = 0.0  # encoding and sending, so far

    def start(self, interval: float, progress: Callable[[], int], tell: Callable[[str], None]) -> None:
        """`progress` is asked every `interval` seconds in which nothing is to be sent: has the number changed?

        Should the thread fail, `tell` is called with the cause and the process ends.
        """
        start_vital_thread("sender", lambda: self._loop(interval, progress), tell)

    def put_outputs(self, outputs: list[SequenceOutput]) -> None:
        """Blocks while too many outputs wait."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._outputs) < self._limit)
            self._outputs += outputs
            self._changed.notify_all()

    def put_heartbeat(self, stats: EngineStats) -> None:
        with self._changed:
            self._stats = stats
            self._changed.notify_all()

    def _loop(self, interval: float, progress: Callable[[], int]) -> None:
        last, seen = None, progress()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outputs or self._stats, interval)
                outputs, self._outputs = self._outputs, []
                stats, self._stats = self._stats, None
                self._changed.notify_all()
            before, seen = seen, progress()
            if not outputs and not stats and seen != before:
                stats = last
            last = stats or last
            began = time.monotonic()
            if outputs:
                self._send(StepOutputs(outputs))
            if stats:
                self._send(Heartbeat(msgspec.structs.replace(stats, send_seconds=self._seconds)))
            self._seconds += time.monotonic() - began
