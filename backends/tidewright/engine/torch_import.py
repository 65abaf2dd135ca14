"""torch's import, a second that each start of an engine waits for, as fast as it gets."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_torch() -> Iterator[None]:
    """Around the import of modules that need it, which saves a quarter of the time.

    It makes 170,000 objects that live as long as the process. A search for garbage among them takes 90 ms, now
    and whenever it happens between two steps: they are left out of it. Nor does torch look for devices of others.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
