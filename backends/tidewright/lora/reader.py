"""Reads adapters in a thread of its own, beside the steps, and keeps each until it is taken or forgotten."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

from tidewright.distributed.rank_messages import AdapterRead
from tidewright.engine.vital_thread import start_vital_thread
from tidewright.lora.adapter import Adapter
from tidewright.lora.config import AdapterError

log = logging.getLogger(__name__)


class AdapterReader:
    """`put`, `take` and `forget` are for one thread."""

    def __init__(
        self, read: Callable[[str], Adapter], done: Callable[[AdapterRead], None], tell: Callable[[str], None]
    ) -> None:
        """`done` is called in the reader's thread. Should that fail, `tell` is called and the process ends."""
        self._read, self._done, self._tell = read, done, tell
        self._requests: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._adapters: dict[int, Adapter] = {}
        self._is_started = False

    def put(self, number: int, path: str) -> None:
        if not self._is_started:
            self._is_started = True
            start_vital_thread("adapters", self._loop, self._tell)
        self._requests.put((number, path))

    def take(self, number: int) -> Adapter:
        """It was read; from here on it is the caller's."""
        return self._adapters.pop(number)

    def forget(self, number: int) -> None:
        """It was read, if it could be, and nobody takes it."""
        self._adapters.pop(number, None)

    def _loop(self) -> None:
        while True:
            number, path = self._requests.get()
            try:
                adapter = self._read(path)
            except AdapterError as error:
                self._done(AdapterRead(number, error=str(error)))
            except Exception as error:  # whatever it is: the adapter is to blame, and nobody else suffers
                log.exception("the adapter in %s could not be read", path)
                self._done(AdapterRead(number, error=f"it could not be read ({type(error).__name__}: {error})"))
            else:
                self._adapters[number] = adapter
                self._done(AdapterRead(number, adapter.digest, adapter.rank, adapter.nbytes))
