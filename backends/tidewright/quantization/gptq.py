"""Checkpoints of GPTQ's format (AutoGPTQ, GPTQModel): codes packed along the inputs, zero points along the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidewright.layers.weights import WeightSlice
from tidewright.quantization.affine import QuantizationError
from tidewright.quantization.packing import PACKED_BITS, WORD_BITS, unpack, words_around
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
        order = order_of(f"{name}.g_idx", parts["g_idx"], in_features, size) if "g_idx" in parts else None
        super().__init__(name, (out_features, in_features), bits, size, order)

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
