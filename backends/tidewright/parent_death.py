"""No child outlives whoever started it: by a signal from the kernel, or by looking for the parent."""

from __future__ import annotations

import ctypes
import os
import threading
import time

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl  # looked up here: between fork and exec, no lock of the loader may be taken


def signal_on_parent_death(number: int) -> None:
    """Send this process signal `number` when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG)."""
    _PRCTL(_PR_SET_PDEATHSIG, number)


def exit_with_parent(interval: float = 0.5) -> None:
    """Watch the parent process, and end this one within about `interval` seconds of its end.

    For Triton's stubs: the thread that starts one may end while Triton lives, so the kernel's signal would come too
    early. A stub whose Triton dies in the middle of a call of it waits for the answer for good.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
