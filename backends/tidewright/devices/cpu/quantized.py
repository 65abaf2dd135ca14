"""The CPU kernels for weights in 8 and 4 bits as functions of torch tensors: source/quantized.cpp.

Activations are quantized to 8 bits as they come, with a scale per token and group of inputs: one per token alone loses
several times as much accuracy (docs/quantization.md).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F

from tidewright.devices.cpu.build import load_library
from tidewright.devices.cpu.kernels import SUFFIXES, KernelArgumentError
from tidewright.quantization.affine import AffineWeight, QuantizationError, joined
from tidewright.quantization.half_scales import as_halves

ACTIVATION_GROUP = 64
"""Inputs that share a scale of the activations, where the weight's scales do not say."""
_HALF_EXPONENT = 14  # the largest scale of a feature is stored below 2^14: room for the smallest beside it


class _QuantizedWeight(Structure):
    pass


_QuantizedWeight._fields_ = [
    ("blocks", c_void_p),
    ("factors", c_void_p),
    ("next", POINTER(_QuantizedWeight)),
    *[(name, c_int64) for name in ("depth", "features", "group")],
    *[(name, c_int32) for name in ("bits", "zero", "has_scales", "has_offsets")],
    *[(name, c_int64) for name in ("first", "width", "inputs")],
    ("order", c_void_p),
]


class PackedQuantizedWeight:
    """Of a linear layer, in the layout that the kernels multiply by. Its rows may be of several formats."""

    def __init__(
        self,
        parts: Sequence[AffineWeight],
        allocate: Callable[[int], torch.Tensor] = lambda size: torch.empty(size, dtype=torch.uint8),
    ) -> None:
        """`allocate` gives memory of so many bytes. Raises QuantizationError: the kernels don't take these weights."""
        library = load_library()
        if library is None:
            raise QuantizationError("there are no kernels for quantized weights: they need a C++ compiler")
        library.quantized_bytes.restype = library.quantized_block.restype = c_int64
        weights = [joined(list(some)) for _, some in itertools.groupby(parts, _format)]
        self.features = sum(weight.codes_FE.shape[0] for weight in weights)
        self.depth = weights[0].get_shape()[1]
        self.nbytes = 0
        self._kept: list[torch.Tensor] = []  # C knows the addresses only
        self._structs: list[_QuantizedWeight] = []
        first = 0
        for weight in weights:
            struct = self._pack(library, weight, allocate)
            struct.first, struct.width = first, self.features
            first += struct.features
            if self._structs:
                self._structs[-1].next = ctypes.pointer(struct)
            self._structs.append(struct)
        self.address = ctypes.addressof(self._structs[0])

    def _pack(
        self, library: ctypes.CDLL, weight: AffineWeight, allocate: Callable[[int], torch.Tensor]
    ) -> _QuantizedWeight:
        features, depth = weight.codes_FE.shape
        if not can_pack(weight):
            raise QuantizationError(f"no kernel takes {weight.bits} bits in groups of {weight.group_size}")
        scales_FG, offsets_FG, group, is_plain = _grouped(weight)
        padding = -features % library.quantized_block()
        struct = _QuantizedWeight(None, None, None, depth, features, group, weight.bits, _zero(weight))
        halves: list[torch.Tensor | None] = [None, None]
        if is_plain:
            factors_F = scales_FG[:, 0]
        else:
            struct.has_scales, struct.has_offsets = 1, int(offsets_FG is not None)
            factors_F, *found = as_halves(scales_FG, offsets_FG, _HALF_EXPONENT)
            halves = [None if values is None else values.contiguous() for values in found]
        factors_F = F.pad(factors_F, (0, padding)).contiguous()
        struct.factors = factors_F.data_ptr()
        size = library.quantized_bytes(ctypes.byref(struct))
        blocks = allocate(size)
        codes_FE = weight.codes_FE.contiguous()
        addresses = [None if values is None else values.data_ptr() for values in halves]
        library.pack_quantized(
            ctypes.byref(struct), c_void_p(blocks.data_ptr()), c_void_p(codes_FE.data_ptr()), *map(c_void_p, addresses)
        )
        struct.blocks, struct.inputs = blocks.data_ptr(), self.depth
        self._kept += [blocks, factors_F]
        if weight.order:
            order_E = weight.order.inputs_E.to(torch.int32)
            struct.order = order_E.data_ptr()
            self._kept.append(order_E)
        self.nbytes += size + factors_F.nbytes
        return struct


class QuantizedKernels:
    """Of one dtype of the activations."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._multiply: Any = getattr(library, f"multiply_quantized_{SUFFIXES[dtype]}")
        self._multiply.argtypes, self._multiply.restype = [c_void_p] * 4 + [c_int64], None
        self._embedding: Any = getattr(library, f"quantized_embedding_{SUFFIXES[dtype]}")
        self._embedding.argtypes, self._embedding.restype = [c_void_p] * 3 + [c_int64], None

    def linear(
        self, x_TE: torch.Tensor, weight: PackedQuantizedWeight, bias_F: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x w^T + bias. A row's result is the same to the bit whatever other rows there are."""
        x_TE = x_TE.contiguous()
        rows, depth = x_TE.shape
        if x_TE.dtype != self.dtype or (bias_F is not None and bias_F.dtype != self.dtype):
            raise KernelArgumentError(f"{self.dtype} tensors are needed, not {x_TE.dtype}")
        if depth != weight.depth:
            raise KernelArgumentError(f"x has rows of {depth}, the weight of {weight.depth}")
        out_TF = x_TE.new_empty((rows, weight.features))
        bias = None if bias_F is None else bias_F.data_ptr()
        self._multiply(weight.address, x_TE.data_ptr(), bias, out_TF.data_ptr(), rows)
        return out_TF

    def embedding(self, ids_T: torch.Tensor, weight: PackedQuantizedWeight) -> torch.Tensor:
        """F.embedding of the dequantized weight."""
        ids_T = ids_T.to(torch.int64).contiguous()
        out_TE = torch.empty((len(ids_T), weight.depth), dtype=self.dtype)
        self._embedding(weight.address, ids_T.data_ptr(), out_TE.data_ptr(), len(ids_T))
        return out_TE


@functools.cache
def quantized_kernels_of(dtype: torch.dtype) -> QuantizedKernels | None:
    """Those for activations of `dtype`; None where torch has to do it."""
    library = load_library()
    return QuantizedKernels(library, dtype) if library and dtype in SUFFIXES else None


def can_pack(weight: AffineWeight) -> bool:
    """Whether the kernels take it: whole words of codes in a group."""
    word = 4 if weight.bits == 8 else 8
    return not weight.is_float and (weight.group_size >= weight.codes_FE.shape[1] or weight.group_size % word == 0)


def _grouped(weight: AffineWeight) -> tuple[torch.Tensor, torch.Tensor | None, int, bool]:
    """Scales and offsets, the kernels' groups, and whether a feature has but one scale, which needs no group's."""
    depth = weight.codes_FE.shape[1]
    scales_FG, offsets_FG = weight.scales_FG, weight.offsets_FG
    if weight.group_size < depth:
        return scales_FG, offsets_FG, weight.group_size, False
    if weight.bits == 8 and offsets_FG is None:
        return scales_FG, None, ACTIVATION_GROUP, True
    scales_FG = scales_FG.expand(-1, -(-depth // ACTIVATION_GROUP))
    offsets_FG = None if offsets_FG is None else offsets_FG.expand_as(scales_FG)
    return scales_FG, offsets_FG, ACTIVATION_GROUP, False


def _zero(weight: AffineWeight) -> int:
    """What makes of the codes numbers from 0 on. Raises QuantizationError: they take more bits than they may."""
    if weight.bits == 8:
        return 128
    least, most = (int(value) for value in weight.codes_FE.aminmax()) if weight.codes_FE.numel() else (0, 0)
    zero = 8 if least < 0 else 0
    if least + zero < 0 or most + zero > 15:
        raise QuantizationError(f"codes of 4 bits are -8 to 7 or 0 to 15, not {least} to {most}")
    return zero


def _format(weight: AffineWeight) -> tuple[object, ...]:
    """Weights that agree in it become one."""
    sign = weight.bits == 4 and bool((weight.codes_FE < 0).any())
    return weight.bits, weight.group_size, weight.offsets_FG is None, sign, weight.order and weight.order.key
