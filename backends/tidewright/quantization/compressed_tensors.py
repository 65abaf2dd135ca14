"""Checkpoints of compressed-tensors' format, as llm-compressor and `tidewright quantize` write it and vLLM reads it.

What a layer's tensors look like says most; config.json's `quantization_config` says what they don't show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tidewright.layers.weights import WeightSlice
from tidewright.quantization.affine import QuantizationError
from tidewright.quantization.packing import PACKED_BITS, unpack, words_around
from tidewright.quantization.stored import (
    Parts,
    StoredWeight,
    expect_parts,
    expect_shape,
    modules,
    order_of,
    signed,
    size_of_groups,
    two_sizes,
    with_zero_points,
)

METHOD = "compressed-tensors"
INT, PACKED, FLOAT = "int-quantized", "pack-quantized", "float-quantized"
_FORMATS = (INT, PACKED, FLOAT, "naive-quantized", "mixed-precision", "dense")
_STRATEGIES = ("tensor", "channel", "group")


class WholeWeight(StoredWeight):
    """A code in a byte each: int8 or float8 e4m3."""

    def __init__(self, name: str, parts: Mapping[str, WeightSlice]) -> None:
        expect_parts(name, parts, "weight", "weight_scale")
        self._parts, shape = parts, two_sizes(f"{name}.weight", parts["weight"])
        self._per_tensor = _is_single(parts["weight_scale"])
        groups = 1 if self._per_tensor else two_sizes(f"{name}.weight_scale", parts["weight_scale"])[1]
        if not self._per_tensor:
            expect_shape(f"{name}.weight_scale", parts["weight_scale"], shape[0], groups)
        if (zeros := parts.get("weight_zero_point")) is not None and not self._per_tensor:
            expect_shape(f"{name}.weight_zero_point", zeros, shape[0], groups)
        if zeros is not None and self._per_tensor and not _is_single(zeros):
            raise QuantizationError(f"{name} has one scale, but several zero points")
        super().__init__(name, shape, 8, size_of_groups(name, shape[1], groups))

    def _read(self, rows: slice, columns: slice, groups: slice) -> Parts:
        codes_FE = self._parts["weight"][rows, columns]
        if codes_FE.dtype not in (torch.int8, torch.float8_e4m3fn):
            raise QuantizationError(f"{self.name}.weight is stored as {codes_FE.dtype}, which is not supported")
        scales_FG = self._numbers("weight_scale", rows, groups)
        if "weight_zero_point" not in self._parts:
            return codes_FE, scales_FG, None
        zeros_FG = self._numbers("weight_zero_point", rows, groups)
        return codes_FE, scales_FG, -scales_FG * zeros_FG if zeros_FG.any() else None

    def _numbers(self, part: str, rows: slice, groups: slice) -> torch.Tensor:
        """float32 [F, G], whatever the scales are shared by."""
        if self._per_tensor:
            whole = tuple(slice(None) for _ in self._parts[part].get_shape())
            return self._parts[part][whole].float().reshape(1, 1).repeat(rows.stop - rows.start, 1)
        return self._parts[part][rows, groups].float()


class PackedWeight(StoredWeight):
    """Codes of 4 or 8 bits in words of 32, along the inputs."""

    def __init__(self, name: str, parts: Mapping[str, WeightSlice]) -> None:
        expect_parts(name, parts, "weight_packed", "weight_scale", "weight_shape")
        expect_shape(f"{name}.weight_shape", parts["weight_shape"], 2)
        sizes = parts["weight_shape"][(slice(None),)]
        if sizes.is_floating_point() or sizes.is_complex():
            raise QuantizationError(f"{name}.weight_shape is stored as {sizes.dtype}, expected whole numbers")
        out_features, in_features = sizes.tolist()
        (rows, words) = two_sizes(f"{name}.weight_packed", parts["weight_packed"])
        bits = next((bits for bits in PACKED_BITS if in_features > 0 and -(-in_features * bits // 32) == words), 0)
        if rows != out_features or not bits:
            raise QuantizationError(
                f"{name} of shape {(out_features, in_features)} is not packed as 4 or 8 bits, which are supported"
            )
        groups = two_sizes(f"{name}.weight_scale", parts["weight_scale"])[1]
        expect_shape(f"{name}.weight_scale", parts["weight_scale"], out_features, groups)
        self._parts, self._has_zeros = parts, "weight_zero_point" in parts
        if self._has_zeros:
            packed_rows = -(-out_features * bits // 32)
            expect_shape(f"{name}.weight_zero_point", parts["weight_zero_point"], packed_rows, groups)
        size = size_of_groups(name, in_features, groups)
        given = parts.get("weight_g_idx")
        order = None if given is None else order_of(f"{name}.weight_g_idx", given, in_features, size)
        super().__init__(name, (out_features, in_features), bits, size, order)

    def _read(self, rows: slice, columns: slice, groups: slice) -> Parts:
        words, inside = words_around(columns, self.bits)
        codes_FE = unpack(self._parts["weight_packed"][rows, words], self.bits, 1)[:, inside].contiguous()
        scales_FG = self._parts["weight_scale"][rows, groups].float()
        if not self._has_zeros:
            return signed(codes_FE, 2 ** (self.bits - 1)), scales_FG, None
        words, inside = words_around(rows, self.bits)
        zeros_FG = unpack(self._parts["weight_zero_point"][words, groups], self.bits, 0)[inside]
        return with_zero_points(codes_FE, scales_FG, zeros_FG, self.bits)


def _is_single(tensor: WeightSlice) -> bool:
    return all(size == 1 for size in tensor.get_shape()) and len(tensor.get_shape()) < 2


def compressed_tensors_weights(
    tensors: Mapping[str, WeightSlice], config: Mapping[str, Any]
) -> dict[str, StoredWeight]:
    """By layer. Raises QuantizationError."""
    check_config(config)
    weights: dict[str, StoredWeight] = {}
    for module, parts in modules(tensors).items():
        if "weight_packed" in parts:
            weights[module] = PackedWeight(module, parts)
        elif "weight_scale" in parts:
            weights[module] = WholeWeight(module, parts)
    return weights


def check_config(config: Mapping[str, Any]) -> None:
    """Raises QuantizationError: names what is not supported, and what to do."""
    for what in _unsupported(config):
        raise QuantizationError(
            f"compressed-tensors with {what} is not supported; run `tidewright quantize` on the original model, or "
            "take a checkpoint in int8, W8A8, W4A16 or fp8"
        )


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    groups = config.get("config_groups") or {}
    groups = list(groups.values()) if isinstance(groups, dict) else []
    for form in (config.get("format", "dense"), *(group.get("format") for group in groups if isinstance(group, dict))):
        if form is not None and form not in _FORMATS:
            yield f"the format {form!r}"
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        yield "sparsity"
    if (config.get("transform_config") or {}).get("config_groups"):
        yield "transforms of activations (transform_config)"
    for group in groups:
        if not isinstance(group, dict):
            yield f"the group {group!r}"
            continue
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
        if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
            yield f"weights of type {kind} and {bits} bits"
        if weights.get("strategy", "tensor") not in _STRATEGIES:
            yield f"the strategy {weights['strategy']!r} of weights"
        if inputs and inputs.get("num_bits", 8) != 8:
            yield f"activations of {inputs['num_bits']} bits"
        if group.get("output_activations"):
            yield "quantized outputs"
