"""All layers of a Llama on a CPU in one call of C: in steps of few rows the calls themselves count.

The same kernels on the same values as one by one, so the results are the same to the bit.
"""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, c_bool, c_float, c_int64, c_void_p
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


class _Layer(Structure):
    _fields_ = [("attention", _AttentionHalf), ("mlp", _MlpHalf)]


_AddUp = CFUNCTYPE(c_bool)


class _Step(Structure):
    _fields_ = [
        ("rows", c_int64),
        *[(name, c_void_p) for name in ("positions", "slots", "spans", "tables")],
        *[(name, c_int64) for name in ("num_spans", "block_size")],
        ("cache", CacheStruct),
        ("layer_vectors", c_int64),
        ("adapters", c_void_p),
        ("layers_computed", POINTER(c_int64)),
    ]


class LayerStep:
    """The tensors of one step: its hidden states on their way through the layers, and what attention needs to know.

    positions_T, slots_T, spans_B4 and tables as for `CpuKernels`' rotate_and_store and paged_attention; `embedded_TE`
    becomes the residual stream and is used up. `layers_computed` is counted up after each layer.
    """

    def __init__(
        self,
        embedded_TE: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        spans_B4: torch.Tensor,
        tables: torch.Tensor,
        cache: KVCache,
        adapters: AdapterRows | None,
        layers_computed: c_int64,
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
            ctypes.pointer(layers_computed),
        )
        self.reference = ctypes.byref(self.struct)

    def hidden(self) -> torch.Tensor:
        """[T, E] once all layers have run."""
        return self.added_TE + self.residual_TE


class CpuLayers:
    """All of a model. `add_up` makes, in place, of the ranks' parts of [T, E] their sum; None: there is one rank."""

    def __init__(self, parts: Sequence[LayerParts], add_up: Callable[[torch.Tensor], object] | None) -> None:
        """Raises KernelArgumentError: the kernels don't take these tensors."""
        library, dtype = load_library(), parts[0].attention_norm.dtype
        if library is None or dtype not in SUFFIXES:
            raise KernelArgumentError(f"there are no kernels for {dtype}")
        self._kept, self._add_up = parts, add_up  # C knows the addresses only
        self._layers = (_Layer * len(parts))(*(_layer(one, dtype) for one in parts))
        self._run = getattr(library, f"run_layers_{SUFFIXES[dtype]}")
        self._run.argtypes = [POINTER(_Layer), c_int64, POINTER(_Step), c_void_p, c_void_p, _AddUp]
        self._run.restype = c_bool

    @property
    def are_quantized(self) -> bool:
        """All of their weights."""
        weights = (one for parts in self._kept for one in (parts.qkv, parts.output, parts.gate_up, parts.down))
        return all(isinstance(weight.packed, PackedQuantizedWeight) for weight in weights)

    def run(self, step: LayerStep) -> None:
        """Raises what `add_up` does."""
        failures: list[BaseException] = []

        def add_up() -> bool:
            assert self._add_up
            try:
                self._add_up(step.added_TE)
            except BaseException as failure:  # C knows no exceptions
                failures.append(failure)
            return not failures

        residual, added = step.residual_TE.data_ptr(), step.added_TE.data_ptr()
        callback = _AddUp(add_up) if self._add_up else _AddUp()
        if not self._run(self._layers, len(self._layers), step.reference, residual, added, callback):
            raise failures[0]


def _layer(parts: LayerParts, dtype: torch.dtype) -> _Layer:
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

    attention = _AttentionHalf(
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
    return _Layer(
        attention, _MlpHalf(address(parts.mlp_norm), linear(parts.gate_up), linear(parts.down), parts.norm_eps)
    )
