"""Checkpoints of GPTQ's format (AutoGPTQ, GPTQModel): codes packed along the inputs, zero points along the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tidewright.layers.weights import WeightSlice
from tidewright.quantization.affine import QuantizationError
from tidewright.quantization.packing import PACKED_BITS, WORD_BITS, unpack, words_around
from tidewright.quantization.stored import (
    Parts,
    StoredWeight,
    expect_parts,
    expect_shape,
    modules,
    signed,
    size_of_groups,
    two_sizes,
    with_zero_points,
)


class GptqWeight(StoredWeight):
    def __init__(
        self,
        name: str,
        parts: Mapping[str, WeightSlice],
        bits: int,
        symmetric: bool,
        zero_plus: int,
        group_size: object = None,
    ) -> None:
        """`group_size`: as config.json says; -1: one group."""
        expect_parts(name, parts, "qweight", "qzeros", "scales")
        self._parts, self._symmetric, self._zero_plus = parts, symmetric, zero_plus
        per_word = WORD_BITS // bits
        (words, out_features), (groups, _) = (
            two_sizes(f"{name}.{part}", parts[part]) for part in ("qweight", "scales")
        )
        in_features = words * per_word
        expect_shape(f"{name}.scales", parts["scales"], groups, out_features)
        expect_shape(f"{name}.qzeros", parts["qzeros"], groups, -(-out_features // per_word))
        size = size_of_groups(name, in_features, groups, group_size)
        super().__init__(name, (out_features, in_features), bits, size)
        self._check_order()

    def _check_order(self) -> None:
        if "g_idx" not in self._parts:
            return
        expect_shape(f"{self.name}.g_idx", self._parts["g_idx"], self.shape[1])
        groups_E = self._parts["g_idx"][(slice(None),)]
        # Some writers leave it all zero if columns are in their order.
        if groups_E.any() and not torch.equal(groups_E.long(), torch.arange(self.shape[1]) // self.group_size):
            raise QuantizationError(
                f"{self.name} is quantized by GPTQ in the order of activations (desc_act), which is not supported; "
                "take a checkpoint made with desc_act false, or run `tidewright quantize` on the original model"
            )

    def _read(self, rows: slice, columns: slice, groups: slice) -> Parts:
        words, inside = words_around(columns, self.bits)
        codes_FE = unpack(self._parts["qweight"][words, rows], self.bits, 0)[inside].t().contiguous()
        scales_FG = self._parts["scales"][groups, rows].float().t().contiguous()
        words, inside = words_around(rows, self.bits)
        zeros_FG = unpack(self._parts["qzeros"][groups, words], self.bits, 1)[:, inside].t().int() + self._zero_plus
        if not self._symmetric:
            return with_zero_points(codes_FE, scales_FG, zeros_FG, self.bits)
        middle = 2 ** (self.bits - 1)
        if (zeros_FG != middle).any():
            raise QuantizationError(
                f"{self.name} has zero points although config.json says sym: one of sym and checkpoint_format is wrong"
            )
        return signed(codes_FE, middle), scales_FG, None


def gptq_weights(tensors: Mapping[str, WeightSlice], config: Mapping[str, Any]) -> dict[str, StoredWeight]:
    """By layer. Raises QuantizationError."""
    bits = config.get("bits")
    if bits not in PACKED_BITS:
        raise QuantizationError(f"GPTQ with {bits!r} bits is not supported; use a checkpoint with 4 or 8")
    form = config.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise QuantizationError(f"GPTQ's checkpoint_format {form!r} is not supported; use gptq or gptq_v2")
    # The first version of the format stores zero points less one.
    symmetric, zero_plus = bool(config.get("sym", True)), int(form == "gptq")
    return {
        module: GptqWeight(module, parts, bits, symmetric, zero_plus, config.get("group_size"))
        for module, parts in modules(tensors).items()
        if "qweight" in parts
    }
