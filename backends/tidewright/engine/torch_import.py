"""torch's import, a second that each start of an engine waits for, as fast as it gets."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

SPINS = "20000"
"""How often an OpenMP thread looks for work before it sleeps (GOMP_SPINCOUNT of GCC's library, which torch brings).

The library's own 300,000 take 7.5 ms, longer than Linux lets a thread run while another waits: a thread that waits at
a barrier keeps the thread that it waits for from its core. These take 0.5 ms: with ten times fewer, threads slept some
20 times a step even where nobody else used the cores. See docs/engine.md for what was measured.
"""


@contextmanager
def importing_torch() -> Iterator[None]:
    """Around the import of modules that need it, which saves a quarter of the time.

    It makes 170,000 objects that live as long as the process. A search for garbage among them takes 90 ms, now
    and whenever it happens between two steps: they are left out of it. Nor does torch look for devices of others.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    if "OMP_WAIT_POLICY" not in os.environ:  # which says the same more coarsely
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when the library is loaded
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
