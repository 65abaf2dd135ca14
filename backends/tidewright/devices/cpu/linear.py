"""Matrix products on a CPU: of the ways there are, the one that is fastest here for the number of rows at hand.

- native: our kernel, for which the weight is rearranged in place. For few rows the memory sets the pace, and nothing is
  faster; for many it multiplies as fast as floats, or bfloat16 on AMD, can be multiplied without AMX.
- onednn: in bfloat16, on a rearranged copy of the weight, which doubles its memory. Much faster for many rows where
  there is AMX.
- plain: F.linear, the only way for other dtypes, or without a compiler for the kernels.

Which is fastest beyond few rows is measured once a process, in about 50 ms.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable

import torch

from tidewright.devices.cpu.kernels import CpuKernels, PackedWeight, kernels_of
from tidewright.layers.linear_method import PlainLinear
from tidewright.quantization.affine import Scheme

_LIMITS = (8, 48, 128, sys.maxsize)  # a way for up to so many rows each
_MEASURED = (16, 64, 256)  # for all but the first
_WORTH_PACKING = 1.15  # so many times faster it must be, as it takes memory
_PACK_FOR_ROWS = 16  # what oneDNN lays the copy out for; other numbers work, too

Ways = tuple[str, str, str, str]


class CpuLinear(PlainLinear):
    """Once finished, where one of the ways is native, `packed` has the weight, and the parameter is empty."""

    def __init__(self, out_features: int, in_features: int, scheme: Scheme | None = None) -> None:
        super().__init__(out_features, in_features, scheme)
        self.packed: PackedWeight | None = None
        self._native: CpuKernels | None = None
        self._onednn: torch.Tensor | None = None
        self._ways: list[tuple[int, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]]] = []

    def finish(self) -> None:
        names = choose_ways(self.weight.dtype)
        if "onednn" in names:
            self._onednn = _reorder(self.weight)  # first: it reads the plain weight
        if "native" in names:
            self._native = kernels_of(self.weight.dtype)
            assert self._native
            self.packed = self._native.pack(self.weight.detach())
            self.weight.data = self.weight.data.new_empty(0)
        ways = {"native": self._by_native, "onednn": self._by_onednn, "plain": self._by_plain}
        self._ways = [(limit, ways[name]) for limit, name in zip(_LIMITS, names, strict=True)]

    def multiply(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        rows = x_TE.shape[0]
        way = next((way for limit, way in self._ways if rows <= limit), self._by_plain)
        return way(x_TE, bias_F)

    def read_rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        if self._native and self.packed:
            return self._native.embedding(ids_T, self.packed)
        return super().read_rows(ids_T)

    def _by_plain(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        return super().multiply(x_TE, bias_F)

    def _by_native(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        assert self._native
        assert self.packed
        return self._native.linear(x_TE, self.packed, bias_F)

    def _by_onednn(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TE, self._onednn, bias_F, "none", [], "")


def native_rows(dtype: torch.dtype) -> int:
    """Up to so many rows, all products go the native way."""
    rows = 0
    for limit, name in zip(_LIMITS, choose_ways(dtype), strict=True):
        if name != "native":
            break
        rows = limit
    return rows


@functools.cache
def choose_ways(dtype: torch.dtype) -> Ways:
    """The ways for up to so many rows as _LIMITS says."""
    native, onednn = kernels_of(dtype), dtype == torch.bfloat16 and _has_onednn_bf16()
    if not native or not onednn:
        way = "native" if native else "onednn" if onednn else "plain"
        return (way, way, way, way)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would be at the mercy of whatever else runs on the machine just now
    try:
        some, many, more = (_fastest(rows, native) for rows in _MEASURED)
    finally:
        torch.set_num_threads(threads)
    return ("native", some, many, more)


@torch.inference_mode()
def _fastest(rows: int, native: CpuKernels) -> str:
    """oneDNN or native, in bfloat16, by the shortest of several runs in turn."""
    weight_FE = torch.randn(1536, 576).bfloat16()
    x_TE = torch.randn(rows, 576).bfloat16()
    reordered, packed = _reorder(weight_FE), native.pack(weight_FE)
    ways: dict[str, Callable[[], object]] = {
        "native": lambda: native.linear(x_TE, packed),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x_TE, reordered, None, "none", [], ""),
    }
    times = dict.fromkeys(ways, float("inf"))
    for _ in range(8):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name] = min(times[name], time.perf_counter() - start)
    return "onednn" if times["onednn"] * _WORTH_PACKING < times["native"] else "native"


def _reorder(weight_FE: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_FE.detach(), _PACK_FOR_ROWS)


def _has_onednn_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
