"""Asks Triton what it does not say by itself: whose client hung up, and whether the model is being unloaded."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection

from tidewright.bridge.active_request import ActiveRequest
from tidewright.schema import ATTEMPT

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.01  # seconds
LOADED_INTERVAL = 1.0  # seconds
POLL_SHARE = 0.05  # of one core, at most: asking Triton is a round trip to its process


class Canceller:
    """`changed` guards `requests`, and is notified of a new one. `cancel` is told of each request whose client hung up.

    While there are requests, `is_loaded` is asked now and then; `unloaded` is told once that it is not so.
    """

    def __init__(
        self,
        changed: threading.Condition,
        requests: Collection[ActiveRequest],
        cancel: Callable[[ActiveRequest], None],
        is_loaded: Callable[[], bool],
        unloaded: Callable[[], None],
    ) -> None:
        self._changed, self._active, self._cancel = changed, requests, cancel
        self._is_loaded, self._unloaded = is_loaded, unloaded
        self._ask_loaded_at = 0.0  # time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="canceller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._active or self._stopping.is_set())
                if self._stopping.is_set():
                    return  # Triton ends too, and aborts if a question to it is open when this process is gone
                # Triton never says of a call from model to model that it was cancelled: failsafe does, by its id.
                requests = [request for request in self._active if request.askable and ATTEMPT not in request.client_id]
            began = time.monotonic()
            for request in requests:
                self._ask(request)
            if began >= self._ask_loaded_at:
                self._ask_loaded_at = began + LOADED_INTERVAL
                self._ask_loaded()
            took = time.monotonic() - began
            self._stopping.wait(max(POLL_INTERVAL, took / POLL_SHARE))

    def _ask(self, request: ActiveRequest) -> None:
        try:
            if request.error is None and request.responder.is_cancelled():
                self._cancel(request)
        except Exception as error:
            _log_failure("whether a client hung up; it is not asked again about this one", error)
            request.askable = False

    def _ask_loaded(self) -> None:
        try:
            if not self._is_loaded():
                self._ask_loaded_at = math.inf
                self._unloaded()
        except Exception as error:
            _log_failure("whether the model is loaded; it is not asked again", error)
            self._ask_loaded_at = math.inf


def _log_failure(what: str, error: Exception) -> None:
    if "not ready" in str(error):  # Triton is ending
        log.info("Triton could not be asked %s: %s", what, error)
    else:
        log.error("Triton could not be asked %s", what, exc_info=error)
