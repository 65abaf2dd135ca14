"""Checkpoints of AutoAWQ's format `gemm`: 4 bits, packed along the outputs in the order of its GPU kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tidewright.layers.weights import WeightSlice
from tidewright.quantization.affine import QuantizationError
from tidewright.quantization.packing import unpack, words_around
from tidewright.quantization.stored import (
    Parts,
    StoredWeight,
    expect_parts,
    expect_shape,
    modules,
    size_of_groups,
    two_sizes,
    with_zero_points,
)

BITS, PER_WORD = 4, 8
# Where in a word each of eight outputs is: it holds 0, 2, 4, 6, 1, 3, 5, 7.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


class AwqWeight(StoredWeight):
    def __init__(self, name: str, parts: Mapping[str, WeightSlice], group_size: object = None) -> None:
        """`group_size`: as config.json says; -1: one group."""
        expect_parts(name, parts, "qweight", "qzeros", "scales")
        self._parts = parts
        (in_features, words), (groups, _) = (two_sizes(name, parts[part]) for part in ("qweight", "scales"))
        expect_shape(f"{name}.scales", parts["scales"], groups, words * PER_WORD)
        expect_shape(f"{name}.qzeros", parts["qzeros"], groups, words)
        size = size_of_groups(name, in_features, groups, group_size)
        super().__init__(name, (words * PER_WORD, in_features), BITS, size)

    def _read(self, rows: slice, columns: slice, groups: slice) -> Parts:
        words, inside = words_around(rows, BITS)
        codes_FE = _unpack(self._parts["qweight"][columns, words])[:, inside].t().contiguous()
        zeros_FG = _unpack(self._parts["qzeros"][groups, words])[:, inside].t()
        scales_FG = self._parts["scales"][groups, rows].float().t().contiguous()
        return with_zero_points(codes_FE, scales_FG, zeros_FG, BITS)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    return unpack(words, BITS, 1).unflatten(1, (-1, PER_WORD))[..., _PLACES].flatten(1)


def awq_weights(tensors: Mapping[str, WeightSlice], config: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """By layer. Raises QuantizationError."""
    bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
    if bits != BITS or version != "gemm" or not config.get("zero_point", True):
        raise QuantizationError(
            f"AWQ with {bits!r} bits, version {version!r}, zero_point {config.get('zero_point', True)!r} is not "
            "supported; use a checkpoint with 4 bits, version gemm and zero points"
        )
    found, group_size = modules(tensors).items(), config.get("group_size", config.get("q_group_size"))
    return {module: AwqWeight(module, parts, group_size) for module, parts in found if "qweight" in parts}
