"""The CPU kernels as functions of torch tensors, for float32 and bfloat16. `kernels_for(x)` is the way in.

The tensors go to C by address: what Python can check cheaply is checked here, that indices lie inside their tables is
up to the caller.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tidewright.devices.cpu.build import load_library
from tidewright.kv_cache.quantized import FP8, INT8, is_quantized
from tidewright.kv_cache.storage import LayerCache

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""Of the C functions, by what they take."""

_ARGUMENTS: dict[str, list[Any]] = {
    "linear": [c_void_p] * 4 + [c_int64] * 3,
    "pack_weight": [c_void_p] + [c_int64] * 2,
    "embedding": [c_void_p] * 3 + [c_int64] * 2,
    "rms_norm": [c_void_p] * 4 + [c_int64] * 2 + [c_float],
    "silu_and_mul": [c_void_p] * 2 + [c_int64] * 2,
    "rotate_and_store": [c_void_p] * 7 + [c_int64] * 4,
    "attention": [c_void_p, c_int64] + [c_void_p] * 4 + [c_int64] * 6 + [c_float] * 2,
}


class KernelArgumentError(TypeError):
    """A tensor has another dtype or layout than the kernel takes."""


class CacheStruct(Structure):
    """A layer's keys and values, as cache.h has them."""

    _fields_ = [
        *[(name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")],
        *[(name, c_int64) for name in ("format", "block_size")],
    ]

    @classmethod
    def of(cls, cache: LayerCache, dtype: torch.dtype) -> CacheStruct:
        """For kernels that compute in `dtype`. Raises KernelArgumentError."""
        tensors = (cache.keys_NSKD, cache.values_NSKD, cache.key_scales_NKS, cache.value_scales_NKS)
        wanted = cache.dtype if is_quantized(cache.dtype) else dtype
        is_scaled = cache.key_scales_NKS is not None and cache.value_scales_NKS is not None
        if is_scaled != is_quantized(wanted):
            raise KernelArgumentError(f"a cache of {cache.dtype} must have scales if it is quantized, and else none")
        for tensor, kind in zip(tensors, (wanted, wanted, torch.float32, torch.float32), strict=True):
            if tensor is not None and (tensor.dtype != kind or not tensor.is_contiguous()):
                raise KernelArgumentError(f"a contiguous {kind} tensor is needed, not {tensor.dtype}")
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return cls(*pointers, {INT8: 1, FP8: 2}.get(cache.dtype, 0), cache.keys_NSKD.shape[1])


@dataclass(frozen=True)
class PackedWeight:
    """Of a linear layer, in the layout that the kernels multiply by; only `CpuKernels.pack` makes one."""

    values: torch.Tensor
    features: int
    depth: int


class CpuKernels:
    """The kernels of one dtype. Sums are taken in float32, results rounded once unless said otherwise."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        functions: dict[str, Any] = {}
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"{name}_{SUFFIXES[dtype]}")
            function.argtypes, function.restype = arguments, None
            functions[name] = function
        library.linear_block.restype = c_int64
        self._block = library.linear_block()
        self._linear = functions["linear"]
        self._pack_weight = functions["pack_weight"]
        self._embedding = functions["embedding"]
        self._rms_norm = functions["rms_norm"]
        self._silu_and_mul = functions["silu_and_mul"]
        self._rotate_and_store = functions["rotate_and_store"]
        self._attention = functions["attention"]

    def pack(self, weight_FE: torch.Tensor) -> PackedWeight:
        """Rearranges the weight, which loses its meaning as a plain tensor.

        In place, unless it is no multiple of what the layout is made of: 32 or 16 features, two values of bfloat16.
        """
        self._check(weight_FE)
        features, depth = weight_FE.shape
        padding = (0, -depth % (4 // weight_FE.itemsize), 0, -features % self._block)
        values = F.pad(weight_FE, padding) if any(padding) else weight_FE
        self._pack_weight(values.data_ptr(), values.shape[1], values.shape[0])
        return PackedWeight(values, features, depth)

    def linear(self, x_TE: torch.Tensor, weight: PackedWeight, bias_F: torch.Tensor | None = None) -> torch.Tensor:
        """F.linear. A row's result is the same to the bit whatever other rows there are."""
        self._check(weight.values, bias_F)
        x_TE = self._rows(x_TE)
        rows, depth = x_TE.shape
        if depth != weight.depth:
            raise KernelArgumentError(f"x has rows of {depth}, the weight of {weight.depth}")
        out_TF = x_TE.new_empty((rows, weight.features))
        bias = None if bias_F is None else bias_F.data_ptr()
        pointers = x_TE.data_ptr(), weight.values.data_ptr(), bias, out_TF.data_ptr()
        self._linear(*pointers, rows, depth, weight.features)
        return out_TF

    def embedding(self, ids_T: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """F.embedding: what the weight had in these rows before it was packed."""
        self._check(weight.values)
        ids_T = ids_T.to(torch.int64).contiguous()
        depth = weight.values.shape[1]
        out_TE = weight.values.new_empty((len(ids_T), depth))
        self._embedding(weight.values.data_ptr(), ids_T.data_ptr(), out_TE.data_ptr(), len(ids_T), depth)
        return out_TE[:, : weight.depth]

    def rms_norm(self, x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        """F.rms_norm over the last dimension."""
        self._check(weight_E)
        x_TE = self._rows(x_TE)
        out_TE = torch.empty_like(x_TE)
        size = weight_E.shape[0]
        self._rms_norm(x_TE.data_ptr(), None, weight_E.data_ptr(), out_TE.data_ptr(), x_TE.numel() // size, size, eps)
        return out_TE

    def add_rms_norm(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """rms_norm(x + residual) and x + residual. The sum takes residual's place in memory."""
        self._check(weight_E, residual_TE)
        x_TE = self._rows(x_TE)
        out_TE = torch.empty_like(x_TE)
        rows, size = x_TE.shape
        self._rms_norm(x_TE.data_ptr(), residual_TE.data_ptr(), weight_E.data_ptr(), out_TE.data_ptr(), rows, size, eps)
        return out_TE, residual_TE

    def silu_and_mul(self, x_T2F: torch.Tensor) -> torch.Tensor:
        """silu(first half of a row) * second half. bfloat16: rounded in between, as F.silu does."""
        x_T2F = self._rows(x_T2F)
        rows, width = x_T2F.shape
        out_TF = x_T2F.new_empty((rows, width // 2))
        self._silu_and_mul(x_T2F.data_ptr(), out_TF.data_ptr(), rows, width // 2)
        return out_TF

    def rotate_and_store(
        self,
        qkv_TXD: torch.Tensor,
        cos_PD: torch.Tensor,
        sin_PD: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        cache: LayerCache,
    ) -> torch.Tensor:
        """The rotated queries q_THD; rotated keys and plain values go to slots_T (block * S + offset) of the cache.

        X: all heads of q, k and v, side by side. The tables are float32, and sin's first half negated; positions and
        slots are int64. A quantized cache gets the codes and scales of kv_cache/quantized.py.
        """
        self._check(qkv_TXD)
        if not (cos_PD.dtype == sin_PD.dtype == torch.float32 and positions_T.dtype == slots_T.dtype == torch.int64):
            raise KernelArgumentError("the tables of cosines and sines must be float32, positions and slots int64")
        tokens, all_heads, size = qkv_TXD.shape
        kv_heads = cache.num_kv_heads
        heads = all_heads - 2 * kv_heads
        q_THD = qkv_TXD.new_empty((tokens, heads, size))
        self._rotate_and_store(
            qkv_TXD.data_ptr(),
            cos_PD.data_ptr(),
            sin_PD.data_ptr(),
            positions_T.data_ptr(),
            slots_T.data_ptr(),
            q_THD.data_ptr(),
            ctypes.byref(CacheStruct.of(cache, self.dtype)),
            tokens,
            heads,
            kv_heads,
            size,
        )
        return q_THD

    def paged_attention(
        self,
        q_THD: torch.Tensor,
        cache: LayerCache,
        spans_B4: torch.Tensor,
        tables: torch.Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Causal attention of new tokens, whose keys are stored already, over their sequences' blocks.

        Both index tensors are int32. spans_B4: for each sequence its first row in q, the position of that token, the
        number of tokens, and where in `tables` its list of blocks begins. window, softcap: as in AttentionLayer; 0 for
        none.
        """
        q_THD = self._heads(q_THD)
        tokens, heads, size = q_THD.shape
        _, block_size, kv_heads, _ = cache.keys_NSKD.shape
        out_THD = q_THD.new_empty((tokens, heads, size))
        self._attention(
            q_THD.data_ptr(),
            q_THD.stride(0),
            ctypes.byref(CacheStruct.of(cache, self.dtype)),
            out_THD.data_ptr(),
            spans_B4.data_ptr(),
            tables.data_ptr(),
            spans_B4.shape[0],
            heads,
            kv_heads,
            size,
            block_size,
            window,
            scale,
            softcap,
        )
        return out_THD

    def _check(self, *tensors: torch.Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and (tensor.dtype != self.dtype or not tensor.is_contiguous()):
                raise KernelArgumentError(f"a contiguous {self.dtype} tensor is needed, not {tensor.dtype}")

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.dtype:
            raise KernelArgumentError(f"a {self.dtype} tensor is needed, not {x.dtype}")
        return x.contiguous()

    def _heads(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Its tokens may lie apart (a slice of q, k and v side by side), a token's heads may not."""
        if x_THD.dtype != self.dtype:
            raise KernelArgumentError(f"a {self.dtype} tensor is needed, not {x_THD.dtype}")
        _, head, one = x_THD.stride()
        return x_THD if one == 1 and head == x_THD.shape[2] else x_THD.contiguous()


def kernels_for(x: torch.Tensor) -> CpuKernels | None:
    """The kernels that take `x`; None where torch has to do it."""
    return _by_dtype().get(x.dtype) if x.is_cpu else None


def kernels_of(dtype: torch.dtype) -> CpuKernels | None:
    """The kernels for CPU tensors of `dtype`."""
    return _by_dtype().get(dtype)


def thread_ids() -> list[int]:
    """Linux's ids of the threads that a kernel called from this thread runs on; none where there are no kernels."""
    library = load_library()
    if library is None:
        return []
    ids = (c_int64 * torch.get_num_threads())()
    library.thread_ids.restype = c_int64
    return list(ids[: library.thread_ids(ids, c_int64(len(ids)))])


@functools.cache
def _by_dtype() -> dict[torch.dtype, CpuKernels]:
    library = load_library()
    return {dtype: CpuKernels(library, dtype) for dtype in SUFFIXES} if library else {}
