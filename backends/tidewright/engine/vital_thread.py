"""Threads whose end is the end of their process: without one of them it would look alive and do nothing."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from tidewright.parent_death import end_within

log = logging.getLogger(__name__)

TELL_TIMEOUT = 2.0  # seconds


def start_vital_thread(name: str, target: Callable[[], None], tell: Callable[[str], None]) -> None:
    """Start a daemon thread. If `target` raises, `tell` is called with the cause, and the process ends."""

    def run() -> None:
        try:
            target()
        except BaseException as error:
            end_within(TELL_TIMEOUT)  # whoever should be told may not listen
            try:
                log.exception("the %s thread has failed, and with it this process", name)
                tell(f"its {name} thread failed ({type(error).__name__}: {error})")
            finally:
                os._exit(1)

    threading.Thread(target=run, name=name, daemon=True).start()
