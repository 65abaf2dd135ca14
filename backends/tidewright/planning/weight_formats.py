"""Bytes of a matrix of weights on a GPU, plain or as devices/cuda/quantized_weight.py has them. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tidewright.quantization import hardware
from tidewright.quantization.methods import AWQ, FP8, GPTQ, quantization_of
from tidewright.quantization.order_parts import part_bits, part_sizes

FLOAT16, FLOAT32 = 2, 4


@dataclass(frozen=True)
class WeightFormat:
    bits: int
    group: int = 0
    """Inputs that share a scale; 0: all."""
    has_offsets: bool = False
    block: int = 1
    """Rows are filled up to whole multiples of so many inputs."""
    output_bytes: int = FLOAT32
    """Of each output's scale or factor."""
    is_ordered: bool = False
    """Groups are of inputs anywhere, as GPTQ in the order of activations makes them."""

    def bytes(self, depth: int, features: int, whole: int = 0) -> int:
        """`whole`: inputs of the layer, where ranks divide them; `depth` are those of one."""
        columns, groups = depth, -(-depth // self.group) if self.group else 0
        if self.is_ordered and self.group and whole > depth:
            # It has some inputs of each group, in parts of which the last is filled up (quantization/input_order.py).
            part, parts = _parts(self.group, depth / whole, self.bits)
            groups = math.ceil(-(-whole // self.group) * parts)
            columns = groups * part
        filled = -(-columns // self.block) * self.block
        return features * (filled * self.bits // 8 + groups * FLOAT16 * (1 + self.has_offsets) + self.output_bytes)


@cache
def _parts(group: int, share: float, bits: int) -> tuple[int, float]:
    """Inputs of a part, and how many parts a group has on average, of whose inputs a rank has this share by chance."""

    def likelihood(count: int) -> float:  # binomial
        ways = math.lgamma(group + 1) - math.lgamma(count + 1) - math.lgamma(group - count + 1)
        return math.exp(ways + count * math.log(share) + (group - count) * math.log1p(-share))

    of_counts = [likelihood(count) for count in range(group + 1)]
    means = {part: sum(of * -(-count // part) for count, of in enumerate(of_counts)) for part in part_sizes(group)}
    part = min(means, key=lambda part: means[part] * part_bits(part, bits))
    return part, means[part]


@dataclass(frozen=True)
class WeightFormats:
    """Of a model: that of its layers, and that of its head and embedding."""

    layers: WeightFormat
    head: WeightFormat

    @classmethod
    def plain(cls, value_bytes: int) -> WeightFormats:
        return cls(_plain(value_bytes), _plain(value_bytes))


def _plain(value_bytes: int) -> WeightFormat:
    return WeightFormat(8 * value_bytes, output_bytes=0)


def _int8() -> WeightFormat:
    return WeightFormat(8, block=32)


def _int4(group: int) -> WeightFormat:
    return WeightFormat(4, group, has_offsets=True, block=64)


SCHEMES = {
    "int8": _int8(),
    "w8a8": _int8(),
    "int4-g32": _int4(32),
    "int4-g64": _int4(64),
    "int4-g128": _int4(128),
    "fp8": WeightFormat(8),
}
"""By the names of quantization/affine.py's schemes."""


def kind_of(weights: WeightFormat) -> str:
    """As quantization/hardware.py names it; empty: they are plain."""
    if weights == SCHEMES["fp8"]:
        return hardware.FP8
    return f"int{weights.bits}" if weights.bits <= 8 else ""


def formats_of(quantization: str, head: str, value_bytes: int, stored: WeightFormats | None) -> WeightFormats:
    """What `--quantization` and `--quantize-head` of serve make of a model, whose checkpoint may be quantized."""
    plain = WeightFormats.plain(value_bytes)
    if quantization in SCHEMES:
        layers = SCHEMES[quantization]
        return WeightFormats(layers, {"int8": SCHEMES["int8"], "same": layers, "keep": plain.head}[head])
    return stored if stored and quantization in ("auto", "stored") else plain


def stored_formats(config: Mapping[str, Any], value_bytes: int) -> WeightFormats | None:
    """Of a quantized checkpoint, as its config.json says of most of its layers; None if it is not quantized."""
    found, plain = quantization_of(config), _plain(value_bytes)
    if found is None:
        return None
    if found["quant_method"] == FP8:
        return WeightFormats(SCHEMES["fp8"], plain)
    if found["quant_method"] in (AWQ, GPTQ):
        bits = found.get("bits", found.get("w_bit", 4))
        group = found.get("group_size", found.get("q_group_size", 0))
        symmetric = found["quant_method"] == GPTQ and bool(found.get("sym", True))
        ordered = bool(found.get("desc_act")) and not found.get("static_groups")
        return WeightFormats(_integers(bits, group, symmetric, ordered), plain)
    listed = found.get("config_groups")
    groups = [group for group in listed.values() if isinstance(group, Mapping)] if isinstance(listed, Mapping) else []
    head = next((group for group in groups if "Embedding" in (group.get("targets") or ())), None)
    return WeightFormats(
        _of_group(groups[0]) if groups else SCHEMES["int8"], plain if head is None else _of_group(head)
    )


def _of_group(group: Mapping[str, Any]) -> WeightFormat:
    weights = group.get("weights") or {}
    if weights.get("type") == "float":
        return SCHEMES["fp8"]
    symmetric, ordered = bool(weights.get("symmetric", True)), weights.get("actorder") == "group"
    return _integers(weights.get("num_bits", 8), weights.get("group_size", 0), symmetric, ordered)


def _integers(bits: object, group: object, symmetric: bool, ordered: bool) -> WeightFormat:
    size = group if isinstance(group, int) and group > 0 else 0
    if bits == 8:
        return WeightFormat(8, size, has_offsets=not symmetric and size > 0, block=32, is_ordered=ordered)
    return WeightFormat(4, size, has_offsets=not symmetric, block=64, is_ordered=ordered)
