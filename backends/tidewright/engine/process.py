"""The engine's conversation with the bridge: a thread that listens, the loop that steps, a thread that answers."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from multiprocessing.connection import Connection

from tidewright.engine.engine import Engine
from tidewright.engine.messages import (
    Abort,
    Configure,
    SequenceOutput,
    Shutdown,
    StartFailed,
    Submit,
    ToBridge,
    ToEngine,
    decode_to_engine,
    encode,
)
from tidewright.engine.outbox import Outbox

log = logging.getLogger(__name__)


class EngineProcess:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._outbox = Outbox(self._send)
        self._engine: Engine
        self._interval = 0.0
        self._last_heartbeat = 0.0
        self._checked_steps = 0  # the KV cache's books were right after so many

    def run(self) -> int:
        """Serves until `Shutdown`; returns the exit status."""
        threading.Thread(target=self._listen, name="intake", daemon=True).start()
        first = self._inbox.get()
        if not isinstance(first, Configure):
            self._send(StartFailed(f"the first message must be configure, not {type(first).__name__}"))
            return 1
        try:
            self._engine = Engine(first.config)
        except Exception as error:
            log.exception("the engine can't start")
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self._send(StartFailed(" ".join(reason.split())))
            return 1
        self._interval = first.config.heartbeat_interval
        self._send(self._engine.ready())
        self._outbox.start()
        try:
            while self._take_messages():
                if expired := self._engine.expire():
                    self._outbox.put_outputs(expired)
                if self._engine.has_work:
                    self._outbox.put_outputs(self._engine.step())
                self._beat()
        except Exception:
            # The state of a half-done step is not worth saving: the bridge starts a new engine and replays.
            log.exception("the step failed")
            return 1
        return 0

    def _listen(self) -> None:
        """Moves messages from the socket to the inbox, also while a step runs."""
        try:
            while True:
                self._inbox.put(decode_to_engine(self._connection.recv_bytes()))
        except (EOFError, OSError):
            # The bridge is gone, and with it all who could want an answer: don't finish the step.
            os._exit(0)

    def _take_messages(self) -> bool:
        """Acts on all that came in, waiting for it if there is nothing else to do; False after `Shutdown`."""
        refused: list[SequenceOutput] = []
        message = self._next_message()
        while message is not None:
            if isinstance(message, Submit):
                refusal = self._engine.submit(message)
                refused += [refusal] if refusal else []
            elif isinstance(message, Abort):
                self._engine.abort(message.request_id)
            elif isinstance(message, Shutdown):
                return False
            message = self._inbox.get_nowait() if not self._inbox.empty() else None
        if refused:
            self._outbox.put_outputs(refused)
        return True

    def _next_message(self) -> ToEngine | None:
        until_heartbeat = max(0.0, self._last_heartbeat + self._interval - time.monotonic())
        try:
            return self._inbox.get(timeout=0.0 if self._engine.has_work else until_heartbeat)
        except queue.Empty:
            return None

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._last_heartbeat >= self._interval:
            stats = self._engine.stats()
            if not self._engine.has_work and stats.steps > self._checked_steps:
                self._engine.check_integrity()
                self._checked_steps = stats.steps
            self._outbox.put_heartbeat(stats)
            self._last_heartbeat = now

    def _send(self, message: ToBridge) -> None:
        try:
            self._connection.send_bytes(encode(message))
        except OSError:
            os._exit(0)  # as in `_listen`
