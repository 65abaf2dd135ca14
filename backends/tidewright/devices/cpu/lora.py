"""LoRA on a CPU: the slots as C finds them, for the kernel that adds all adapters of a step in one call (lora.cpp).

A slot holds addresses of the host's own copy: to fill one copies nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p

import torch
import torch.nn.functional as F

from tidewright.devices.cpu.build import load_library
from tidewright.devices.cpu.kernels import SUFFIXES, KernelArgumentError
from tidewright.lora.adapter import LowRank, Update
from tidewright.lora.layer import LoraLayer, Parts
from tidewright.step.adapters import AdapterRows


class _Update(Structure):
    """As lora.h has it, as the others here."""

    _fields_ = [
        *[(name, c_int64) for name in ("rank", "first", "features")],
        *[(name, c_void_p) for name in ("a", "b")],
        ("scale", c_float),
    ]


class _Lora(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("depth", "features", "parts", "most_rank", "most_features")],
        ("updates", POINTER(_Update)),
    ]


class _Rows(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("rows", "tiles")],
        *[(name, c_int64) for name in ("num_rows", "num_tiles")],
    ]


class AdapterRowsStruct:
    """A step's rows for C, as long as this lives."""

    def __init__(self, adapters: AdapterRows) -> None:
        self._kept = adapters
        rows, tiles = adapters.rows_N, adapters.tiles_M3
        self._struct = _Rows(rows.data_ptr(), tiles.data_ptr(), len(rows), len(tiles))
        self.address = ctypes.addressof(self._struct)


class CpuLora(LoraLayer):
    def __init__(
        self, part_features: Sequence[int], in_features: int, slots: int, max_rank: int, dtype: torch.dtype
    ) -> None:
        """`dtype` is one that the kernels take."""
        super().__init__(part_features, slots)
        library = load_library()
        assert library is not None
        self._add = getattr(library, f"add_lora_{SUFFIXES[dtype]}")
        self._add.argtypes, self._add.restype = [c_void_p] * 4, None
        layout = [c_int64() for _ in range(3)]
        library.lora_layout(*map(ctypes.byref, layout))
        self._ranks, self._lanes, self._group = (number.value for number in layout)
        self._dtype, self._shape = dtype, (in_features, sum(part_features))
        self._updates = (_Update * (slots * len(part_features)))()
        self._struct = _Lora(*self._shape, len(part_features), max_rank, max(part_features), self._updates)
        self.address = ctypes.addressof(self._struct)

    def arranged(self, update: LowRank) -> Update:
        """Each matrix as the one stream that the kernel reads."""
        a_RE = F.pad(update.a_RE, (0, -update.a_RE.shape[1] % self._lanes))
        chunks = [chunk.unflatten(1, (-1, self._lanes)).transpose(0, 1).flatten() for chunk in a_RE.split(self._ranks)]
        b_RF = F.pad(update.b_RF, (0, -update.b_RF.shape[1] % self._group))
        b = b_RF.unflatten(1, (-1, self._group)).transpose(0, 1).flatten()
        return Update(torch.cat(chunks), b, update.scale, update.rank)

    def put(self, slot: int, parts: Parts) -> None:
        super().put(slot, parts)  # keeps the tensors, of which C knows the addresses only
        count = len(self._features)
        for number, own in enumerate(self._features):
            update, place = parts[number] if parts else None, self._updates[slot * count + number]
            place.rank, place.first, place.features = 0, own.start, own.stop - own.start
            if update:
                for tensor in (update.a, update.b):
                    if tensor.dtype != self._dtype or not tensor.is_contiguous():
                        raise KernelArgumentError(f"a contiguous {self._dtype} tensor is needed, not {tensor.dtype}")
                place.a, place.b = update.a.data_ptr(), update.b.data_ptr()
                place.rank, place.scale = update.rank, update.scale

    def add(self, x_TE: torch.Tensor, y_TF: torch.Tensor, adapters: AdapterRows) -> None:
        """A row's result is the same to the bit whatever other rows there are."""
        x_TE = x_TE.contiguous()
        for tensor, size in ((x_TE, self._shape[0]), (y_TF, self._shape[1])):
            if tensor.dtype != self._dtype or not tensor.is_contiguous() or tensor.shape[-1] != size:
                raise KernelArgumentError(f"contiguous {self._dtype} rows of {size} are needed, not {tensor.shape}")
        rows = AdapterRowsStruct(adapters)
        self._add(self.address, rows.address, x_TE.data_ptr(), y_TF.data_ptr())
