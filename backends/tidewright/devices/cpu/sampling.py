"""Draws a step's tokens on a CPU in one call of C: what sampling/sampler.py's `choose_in_torch` draws.

Weights differ from torch's in their last bits, as exp and the order of the sums differ. truncation.race tolerates that:
about one draw in a million from equal logits gives another token. A row's token depends on that row alone.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_int64, c_void_p
from typing import Any

import numpy as np
import torch

from tidewright.devices.cpu.build import load_library
from tidewright.devices.cpu.kernels import SUFFIXES
from tidewright.sampling.token_counts import TokenCounts
from tidewright.step.sampling import Columns, SamplingBatch

_NAMES = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "position"),
)


class _Columns(Structure):
    """As sampling.cpp has it."""

    _fields_ = [(name, c_void_p) for name in _NAMES]


class CpuChoice:
    """A `Choose`. For one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[torch.dtype, Any] = {}
        for dtype, suffix in SUFFIXES.items():
            function = self._functions[dtype] = getattr(library, f"sample_{suffix}")
            function.argtypes = [c_void_p, c_int64, POINTER(_Columns), c_void_p, c_void_p, c_int64, c_int64]
            function.restype = None
        self._of: Columns[torch.Tensor] | None = None
        self._columns = _Columns()

    def __call__(self, logits_RV: torch.Tensor, batch: SamplingBatch, counts: TokenCounts) -> torch.Tensor:
        if logits_RV.dtype not in self._functions or logits_RV.stride(1) != 1:
            logits_RV = logits_RV.float().contiguous()
        if batch.all_device is not self._of:  # the buffers of all steps are the same
            self._of = batch.all_device
            self._columns = _Columns(*(getattr(self._of, name).data_ptr() for name in _NAMES))
        rows, vocab = logits_RV.shape
        kept: list[np.ndarray] = []
        history_R3 = None if batch.is_plain else _histories(batch, counts, kept)
        tokens_R = torch.empty(rows, dtype=torch.int64)
        self._functions[logits_RV.dtype](
            logits_RV.data_ptr(),
            logits_RV.stride(0),
            self._columns,
            None if history_R3 is None else history_R3.ctypes.data,
            tokens_R.data_ptr(),
            rows,
            vocab,
        )
        if history_R3 is not None and (tokens_R < 0).any():
            raise IndexError(f"a token of a history is outside of the vocabulary of {vocab}")
        return tokens_R


def _histories(batch: SamplingBatch, counts: TokenCounts, kept: list[np.ndarray]) -> np.ndarray | None:
    """By row where TokenCounts are: 0 of them without penalties. Valid as long as `kept`."""
    is_penalised = batch.host.is_penalised.tolist()
    if True not in is_penalised:
        return None
    places: list[tuple[int, int, int]] = []
    for draw, asked in zip(batch.draws, is_penalised, strict=True):
        if not asked or not draw.history.length:
            places.append((0, 0, 0))
        elif draw.history.drafts:
            tokens, numbers = counts.of(draw)
            kept += (tokens, numbers)
            places.append((tokens.ctypes.data, numbers.ctypes.data, len(tokens)))
        else:
            places.append(counts.place_of(draw))
    return np.array(places)


def cpu_choice() -> CpuChoice | None:
    """None: torch has to do it."""
    library = load_library()
    return CpuChoice(library) if library else None
