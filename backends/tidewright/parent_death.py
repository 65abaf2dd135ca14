"""No process stays that nobody needs: its parent is gone, or its work is done and its end hangs."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl  # looked up here: between fork and exec, no lock of the loader may be taken


def signal_on_parent_death(number: int) -> None:
    """Send this process signal `number` when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG)."""
    _PRCTL(_PR_SET_PDEATHSIG, number)


def exit_with_parent(interval: float = 0.1) -> None:
    """Watch the parent process, and end this one as soon as it ends (kernels before 5.3: within `interval` seconds).

    For Triton's stubs: the thread that starts one may end while Triton lives, so the kernel's signal would come too
    early. A stub whose Triton dies in the middle of a call of it waits for the answer for good, and one that finds out
    by itself, which it looks for every 0.3 s, can hang with Python's lock held while it cleans up: be faster.
    """
    parent = os.getppid()

    def watch() -> None:
        try:
            end = select.poll()
            end.register(os.pidfd_open(parent))
        except OSError:
            while os.getppid() == parent:
                time.sleep(interval)
        else:
            if os.getppid() == parent:
                end.poll()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def end_within(seconds: float = 10.0) -> None:
    """Let the kernel end this process (SIGALRM) if it still exists then.

    For the end of `finalize`, after which no Python thread runs: a stub can hang while its interpreter ends, for
    example in a call of another model that nobody will answer, and outlive Triton.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)


def end_now(status: int) -> NoReturn:
    """End this process without the end of its interpreter.

    That one stops daemon threads wherever they are, and if it is in C++ or Rust, the process aborts (SIGABRT) instead
    of ending with its status.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # also if nobody reads them any longer
