"""Memory in huge pages, where Linux gives it: reading all weights each step is a fifth faster than from small pages.

With small ones the processor spends its time looking up where they are, the more so in a virtual machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
from torch import nn

_MAP_NORESERVE = 0x4000  # of Linux; Python's mmap module has it from 3.12 on
_ALIGNMENT = 64  # bytes: a line of the processor's cache


def huge_empty(size: int, reserves: bool = False) -> torch.Tensor:
    """[size] bytes, zero, which take memory only when they are written to.

    `reserves`: most may never be, so a kernel that is careful with promises should not count them.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if reserves else 0)
    pages = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def release_pages(memory: torch.Tensor) -> None:
    """Gives the kernel back what lies wholly within: it is zero when it is next read. `memory` is of `huge_empty`."""
    if not memory.nbytes:
        return
    page = mmap.PAGESIZE
    start, end = -(-memory.data_ptr() // page) * page, (memory.data_ptr() + memory.nbytes) // page * page
    libc = ctypes.CDLL(None, use_errno=True)
    dont_need = ctypes.c_int(mmap.MADV_DONTNEED)
    if start < end and libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need) != 0:
        # Not a page of ours: a bug. No OSError, whose ENOMEM would pass for a lack of memory.
        raise RuntimeError(f"madvise failed with errno {ctypes.get_errno()}")


class HugePages:
    """Hands out pieces of large mappings: a piece alone would be too small to have huge pages of its own."""

    _CHUNK = 256 << 20  # bytes; what is not handed out takes no memory

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> torch.Tensor:
        """[size] bytes, zero. Its mapping goes when all its pieces have."""
        padded = -(-size // _ALIGNMENT) * _ALIGNMENT
        if padded > len(self._left):
            self._left = huge_empty(max(padded, self._CHUNK))
        piece, self._left = self._left.split([padded, len(self._left) - padded])
        return piece[:size]


def move_to_huge_pages(module: nn.Module) -> None:
    """The parameters get new, empty memory there, side by side. To be called before they are loaded."""
    parameters = list(module.parameters())
    sizes = [-(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
    if not sum(sizes):
        return
    for parameter, part in zip(parameters, huge_empty(sum(sizes)).split(sizes), strict=True):
        parameter.data = part[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
