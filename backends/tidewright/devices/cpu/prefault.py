"""Memory for the KV cache's next blocks, before they are used.

The kernel clears pages at the first touch. In the middle of a prefill that cost a sixteenth of its time.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections.abc import Iterator

import torch

from tidewright.kv_cache.storage import KVCache

_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap module
_AHEAD = 256 << 20  # bytes
_PIECE = 4 << 20  # bytes at a time, so that a step that begins is soon alone
_QUIET = 0.05  # seconds without a step

logger = logging.getLogger(__name__)


class Prefaulter:
    """Brings `ahead` bytes of blocks behind the highest used one into memory, whenever there is no step to compute.

    Their content stays as it is. With an old kernel it does nothing.
    """

    def __init__(self, cache: KVCache, ahead: int = _AHEAD) -> None:
        self._cache = cache
        self._ahead = ahead * cache.num_blocks // max(cache.nbytes, 1) + 1  # blocks
        self._end = 0  # the blocks before it are in memory, or will be
        self._worker: threading.Thread | None = None
        self._in_step = False
        self._last_step = 0.0

    @contextlib.contextmanager
    def step(self, block: int) -> Iterator[None]:
        """Around each step. `block` is used in it; the pool gives fresh blocks out in their order."""
        self._in_step = True
        try:
            yield
        finally:
            # In this order: the worker would take the time since the step before for quiet.
            self._last_step, self._in_step = time.monotonic(), False
            end = min(block + 1 + self._ahead, self._cache.num_blocks)
            is_worth_it = end - self._end > self._ahead // 4 or self._end < end == self._cache.num_blocks
            if is_worth_it and (self._worker is None or not self._worker.is_alive()):
                self._worker = threading.Thread(target=self._populate, args=(self._end, end), daemon=True)
                self._end = end
                self._worker.start()

    def resized(self) -> None:
        """Blocks behind the last are no longer in memory."""
        self._end = min(self._end, self._cache.num_blocks)

    def wait(self) -> None:
        """Until the blocks ahead are in memory."""
        if self._worker is not None:
            self._worker.join()

    def _populate(self, first: int, end: int) -> None:
        for layer in self._cache.layers:
            for tensor in layer.tensors:
                used = tensor[first : min(end, self._cache.num_blocks)]
                for piece in used.view(-1).split(_PIECE // tensor.itemsize):
                    while self._in_step or time.monotonic() - self._last_step < _QUIET:
                        time.sleep(_QUIET)
                    if not _populate(piece):
                        return


def _populate(memory: torch.Tensor) -> bool:
    """Whether the kernel has its pages in memory now."""
    page = os.sysconf("SC_PAGE_SIZE")
    start = memory.data_ptr() // page * page
    size = memory.data_ptr() + memory.nbytes - start
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_POPULATE_WRITE) == 0:
        return True
    logger.debug("pages are not populated ahead: %s", os.strerror(ctypes.get_errno()))
    return False
