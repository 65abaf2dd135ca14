"""Matrix products on a CPU: of the ways there are, the one that is fastest here for the number of rows at hand.

- native: our kernel, reads each weight once. For few rows the memory sets the pace, and nothing is faster.
- packed: oneDNN in bfloat16 on a rearranged copy of the weight, which doubles its memory. Fastest for many rows where
  the processor multiplies bfloat16 in hardware (AMX, AVX512-BF16 of AMD).
- float32: upcasts weight and rows in each product. Fastest for many rows where bfloat16 is slow.
- plain: F.linear, the only way for other dtypes, or without a compiler for the kernels.

Which is fastest beyond few rows is measured once a process, in about 50 ms.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tidewright.kernels.cpu import CpuKernels, kernels_of

_FEW, _SOME, _MANY = 8, 48, 128  # up to so many rows each
_WORTH_PACKING = 1.15  # so many times faster it must be, as it takes memory
_PACK_FOR_ROWS = 16  # what oneDNN lays the copy out for; other numbers work, too
_UPCAST_LIMIT = 2**24  # values: no copy of more than 64 MiB for one product

Way = Callable[[torch.Tensor], torch.Tensor]


class CpuLinear:
    """x w^T + bias with a weight_FE (and bias_F) that no longer change. The weight itself is kept, not copied."""

    def __init__(self, weight_FE: torch.Tensor, bias_F: torch.Tensor | None = None) -> None:
        self._weight_FE, self._bias_F = weight_FE.contiguous(), bias_F
        self._native = kernels_of(weight_FE.dtype)
        names = choose_ways(weight_FE.dtype)
        self._packed = _pack(weight_FE) if "packed" in names else None
        ways = {
            "native": self._by_native,
            "packed": self._by_packed,
            "float32": self._by_float32,
            "plain": self._by_plain,
        }
        if weight_FE.numel() > _UPCAST_LIMIT:
            ways["float32"] = ways[names[0]]
        self._few, self._some, self._many, self._more = (ways[name] for name in names)

    def multiply(self, x_TE: torch.Tensor) -> torch.Tensor:
        rows = x_TE.shape[0]
        if rows <= _FEW:
            return self._few(x_TE)
        if rows <= _SOME:
            return self._some(x_TE)
        return self._many(x_TE) if rows <= _MANY else self._more(x_TE)

    def _by_native(self, x_TE: torch.Tensor) -> torch.Tensor:
        assert self._native
        return self._native.linear(x_TE, self._weight_FE, self._bias_F)

    def _by_packed(self, x_TE: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TE, self._packed, self._bias_F, "none", [], "")

    def _by_float32(self, x_TE: torch.Tensor) -> torch.Tensor:
        bias_F = None if self._bias_F is None else self._bias_F.float()
        return F.linear(x_TE.float(), self._weight_FE.float(), bias_F).to(x_TE.dtype)

    def _by_plain(self, x_TE: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TE, self._weight_FE, self._bias_F)


def native_rows(dtype: torch.dtype) -> int:
    """Up to so many rows, all products go the native way."""
    few, some, many, _ = (name == "native" for name in choose_ways(dtype))
    if not few:
        return 0
    if not some:
        return _FEW
    return _MANY if many else _SOME


@functools.cache
def choose_ways(dtype: torch.dtype) -> tuple[str, str, str, str]:
    """The ways for up to _FEW, _SOME, _MANY, and more rows."""
    native = kernels_of(dtype)
    if dtype != torch.bfloat16:
        return ("native" if native else "plain", "plain", "plain", "plain")
    if not native and not _has_onednn_bf16():
        return ("plain", "plain", "plain", "plain")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would be at the mercy of whatever else runs on the machine just now
    try:
        # Beyond _MANY rows the native kernel has no chance: it does not keep x close.
        some, many, more = _fastest(16, native), _fastest(64, native), _fastest(256, None)
    finally:
        torch.set_num_threads(threads)
    return ("native" if native else some, some, many, more)


@torch.inference_mode()
def _fastest(rows: int, native: CpuKernels | None) -> str:
    """Packed, or else native (float32 if there is none), in bfloat16, by the shortest of several runs in turn."""
    weight_FE = torch.randn(1536, 576).bfloat16()
    x_TE = torch.randn(rows, 576).bfloat16()
    ways: dict[str, Callable[[], object]] = {}
    if native:
        ways["native"] = lambda: native.linear(x_TE, weight_FE)
    else:
        ways["float32"] = lambda: F.linear(x_TE.float(), weight_FE.float()).bfloat16()
    if _has_onednn_bf16():
        packed = _pack(weight_FE)
        ways["packed"] = lambda: torch.ops.mkldnn._linear_pointwise(x_TE, packed, None, "none", [], "")
    times = dict.fromkeys(ways, float("inf"))
    for _ in range(8):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name] = min(times[name], time.perf_counter() - start)
    if "packed" in times:
        times["packed"] *= _WORTH_PACKING
    return min(times, key=times.__getitem__)


def _pack(weight_FE: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_FE.detach(), _PACK_FOR_ROWS)


def _has_onednn_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
