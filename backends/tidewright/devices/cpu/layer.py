"""A Llama layer on a CPU in two calls of C instead of eight: in steps of few rows the calls themselves count.

The same kernels on the same values as one by one, so the results are the same to the bit.
"""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tidewright.devices.cpu.build import load_library
from tidewright.devices.cpu.kernels import SUFFIXES, CacheStruct, KernelArgumentError, PackedWeight
from tidewright.devices.cpu.lora import AdapterRowsStruct, CpuLora
from tidewright.devices.cpu.quantized import PackedQuantizedWeight
from tidewright.kv_cache.storage import KVCache
from tidewright.step.adapters import AdapterRows


class Weight(NamedTuple):
    """Of a linear layer."""

    packed: PackedWeight | PackedQuantizedWeight
    bias_F: torch.Tensor | None = None
    lora: CpuLora | None = None


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What a layer is made of, on this rank: contiguous tensors of one dtype; float32 tables; weights of any kind."""

    attention_norm: torch.Tensor
    qkv: Weight
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Weight
    mlp_norm: torch.Tensor
    gate_up: Weight  # the halves side by side, for silu(gate) * up
    down: Weight
    cos: torch.Tensor  # [positions, head size], as attention.base.Rotation has them
    sin: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    scale: float
    window: int  # as in AttentionLayer; 0 for none
    softcap: float


class _Linear(Structure):
    # Either `weight` or `quantized`.
    _fields_ = [
        *[(name, c_void_p) for name in ("weight", "quantized", "bias", "lora")],
        *[(name, c_int64) for name in ("depth", "features")],
    ]


class _AttentionHalf(Structure):
    _fields_ = [
        ("norm", c_void_p),
        ("qkv", _Linear),
        ("output", _Linear),
        *[(name, c_void_p) for name in ("q_norm", "k_norm", "cos", "sin")],
        *[(name, c_int64) for name in ("heads", "kv_heads", "size", "window")],
        *[(name, c_float) for name in ("eps", "scale", "softcap")],
    ]


class _MlpHalf(Structure):
    _fields_ = [("norm", c_void_p), ("gate_up", _Linear), ("down", _Linear), ("eps", c_float)]


class _Step(Structure):
    _fields_ = [
        ("rows", c_int64),
        *[(name, c_void_p) for name in ("positions", "slots", "spans", "tables")],
        *[(name, c_int64) for name in ("num_spans", "block_size")],
        ("cache", CacheStruct),
        ("layer_vectors", c_int64),
        ("adapters", c_void_p),
    ]


class LayerStep:
    """The tensors of one step: its hidden states on their way through the layers, and what attention needs to know.

    positions_T, slots_T, spans_B4 and tables as for `CpuKernels`' rotate_and_store and paged_attention; `embedded_TE`
    becomes the residual stream and is used up.
    """

    def __init__(
        self,
        embedded_TE: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        spans_B4: torch.Tensor,
        tables: torch.Tensor,
        cache: KVCache,
        adapters: AdapterRows | None = None,
    ) -> None:
        self._adapters = AdapterRowsStruct(adapters) if adapters else None
        self._indices = positions_T, slots_T, spans_B4, tables  # C knows their addresses only
        self.residual_TE, self.added_TE = embedded_TE, torch.empty_like(embedded_TE)
        pointers = (tensor.data_ptr() for tensor in self._indices)
        blocks, block_size, kv_heads, _ = cache.layers[0].keys_NSKD.shape
        self.struct = _Step(
            embedded_TE.shape[0],
            *pointers,
            spans_B4.shape[0],
            block_size,
            CacheStruct.of(cache.layers[0], embedded_TE.dtype),
            blocks * block_size * kv_heads,
            self._adapters.address if self._adapters else None,
        )
        self.reference = ctypes.byref(self.struct)

    def hidden(self) -> torch.Tensor:
        """[T, E] once all layers have run."""
        return self.added_TE + self.residual_TE


class CpuLayer:
    """Layer number `index`. `add_up` makes, in place, of the ranks' parts of [T, E] their sum."""

    def __init__(self, index: int, parts: LayerParts, add_up: Callable[[torch.Tensor], object]) -> None:
        """Raises KernelArgumentError: the kernels don't take these tensors."""
        library, dtype = load_library(), parts.attention_norm.dtype
        if library is None or dtype not in SUFFIXES:
            raise KernelArgumentError(f"there are no kernels for {dtype}")
        self._index, self._add_up = index, add_up
        weights = (parts.qkv, parts.output, parts.gate_up, parts.down)
        self.is_quantized = all(isinstance(weight.packed, PackedQuantizedWeight) for weight in weights)
        self._kept = parts  # C knows the addresses only
        self._attention_half = getattr(library, f"attention_half_{SUFFIXES[dtype]}")
        self._attention_half.argtypes = [POINTER(_AttentionHalf), POINTER(_Step), c_int64] + [c_void_p] * 3
        self._mlp_half = getattr(library, f"mlp_half_{SUFFIXES[dtype]}")
        self._mlp_half.argtypes = [POINTER(_MlpHalf), POINTER(_Step)] + [c_void_p] * 3
        self._attention_half.restype = self._mlp_half.restype = None

        def address(tensor: torch.Tensor | None, wanted: torch.dtype = dtype) -> int | None:
            if tensor is not None and not (tensor.is_cpu and tensor.is_contiguous() and tensor.dtype == wanted):
                raise KernelArgumentError(f"a contiguous {wanted} tensor on the CPU is needed, not {tensor.dtype}")
            return None if tensor is None else tensor.data_ptr()

        def linear(weight: Weight) -> _Linear:
            packed, bias = weight.packed, address(weight.bias_F)
            lora = weight.lora.address if weight.lora else None
            if isinstance(packed, PackedQuantizedWeight):
                return _Linear(None, packed.address, bias, lora, packed.depth, packed.features)
            return _Linear(address(packed.values), None, bias, lora, packed.depth, packed.features)

        self._attention = _AttentionHalf(
            address(parts.attention_norm),
            linear(parts.qkv),
            linear(parts.output),
            address(parts.q_norm),
            address(parts.k_norm),
            address(parts.cos, torch.float32),
            address(parts.sin, torch.float32),
            parts.num_heads,
            parts.num_kv_heads,
            parts.head_dim,
            parts.window,
            parts.norm_eps,
            parts.scale,
            parts.softcap,
        )
        self._mlp = _MlpHalf(address(parts.mlp_norm), linear(parts.gate_up), linear(parts.down), parts.norm_eps)
        self._attention_reference, self._mlp_reference = ctypes.byref(self._attention), ctypes.byref(self._mlp)

    def run(self, step: LayerStep) -> None:
        residual, added = step.residual_TE.data_ptr(), step.added_TE.data_ptr()
        before = added if self._index else None  # the embedding alone is the stream
        self._attention_half(self._attention_reference, step.reference, self._index, before, residual, added)
        self._add_up(step.added_TE)
        self._mlp_half(self._mlp_reference, step.reference, added, residual, added)
        self._add_up(step.added_TE)
