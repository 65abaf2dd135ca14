"""Collectives between CPU ranks of one host, through memory that they share (devices/cpu/source/collectives.cpp).

gloo takes some hundred microseconds for a small sum, mostly waking threads up; this takes about ten.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import c_double, c_int64, c_void_p

import torch

from tidewright.devices.cpu.build import load_library
from tidewright.devices.cpu.kernels import SUFFIXES

# As in collectives.cpp.
MAX_RANKS, FLAG_BYTES, SLOT_BYTES = 64, 64, 1 << 18


class CollectiveError(RuntimeError):
    """Another rank did not come to a collective in time."""


class SharedMemory:
    """One rank's end. All ranks must make the same calls in the same order."""

    def __init__(self, library: ctypes.CDLL, file: int, rank: int, size: int, timeout: float) -> None:
        self._rank, self._size, self._timeout = rank, size, timeout
        length = MAX_RANKS * FLAG_BYTES + 2 * size * SLOT_BYTES
        os.ftruncate(file, length)  # new bytes are zeros; of the same length nothing changes
        self._memory = mmap.mmap(file, length)
        self._region = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._round = 0
        self._functions = {}
        for dtype, suffix in SUFFIXES.items():
            head = [c_void_p, c_int64, c_int64, c_int64, c_double]
            reduce, gather = getattr(library, f"all_reduce_{suffix}"), getattr(library, f"gather_{suffix}")
            reduce.argtypes, reduce.restype = [*head, c_void_p, c_int64], c_int64
            gather.argtypes, gather.restype = [*head, c_void_p, c_void_p, c_int64, c_int64], c_int64
            self._functions[dtype] = (reduce, gather)

    @classmethod
    def attach(cls, file: int, rank: int, size: int, timeout: float) -> SharedMemory | None:
        """To the memory that descriptor `file` stands for; None where there is no compiler for the kernels.

        `timeout` is in seconds, for each collective.
        """
        library = load_library()
        return cls(library, file, rank, size, timeout) if library and size <= MAX_RANKS else None

    def takes(self, x: torch.Tensor) -> bool:
        return x.dtype in self._functions

    def all_reduce(self, x: torch.Tensor) -> None:
        """x, which must be contiguous, becomes the sum over ranks: in float32, rounded once, the same bits everywhere.

        Raises:
            CollectiveError: a rank did not come.
        """
        assert x.is_contiguous()
        reduce, _ = self._functions[x.dtype]
        self._advance(reduce(*self._head, x.data_ptr(), x.numel()))

    def gather(self, x_TF: torch.Tensor) -> torch.Tensor | None:
        """On rank 0 the ranks' rows side by side, None on the others; raises as `all_reduce`."""
        x_TF = x_TF.contiguous()
        rows, width = x_TF.shape
        out_TF = x_TF.new_empty((rows, width * self._size)) if self._rank == 0 else None
        _, gather = self._functions[x_TF.dtype]
        out = None if out_TF is None else out_TF.data_ptr()
        self._advance(gather(*self._head, x_TF.data_ptr(), out, rows, width))
        return out_TF

    @property
    def _head(self) -> tuple[int, int, int, int, float]:
        return self._region, self._rank, self._size, self._round, self._timeout

    def _advance(self, round_: int) -> None:
        if round_ < 0:
            raise CollectiveError(f"a rank did not come to a collective within {self._timeout:g} s")
        self._round = round_
