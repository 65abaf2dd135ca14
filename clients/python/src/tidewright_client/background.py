"""Work that a finalizer may not do itself: it runs anywhere, also where a lock is held that the work needs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


def soon(work: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # at the interpreter's end, which closes all connections itself
        threading.Thread(target=work, name="tidewright-close", daemon=True).start()
