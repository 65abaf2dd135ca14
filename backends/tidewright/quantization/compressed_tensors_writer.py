"""A quantized weight as compressed-tensors' format stores it, and what its config.json says of a model of them."""

from __future__ import annotations

from typing import Any

import torch

from tidewright.quantization.affine import AffineWeight, Scheme
from tidewright.quantization.compressed_tensors import FLOAT, INT, PACKED
from tidewright.quantization.methods import COMPRESSED_TENSORS
from tidewright.quantization.packing import pack


def format_of(scheme: Scheme) -> str:
    """Weight-only integers are packed, whatever their bits: vLLM expects it."""
    if scheme.is_float:
        return FLOAT
    return INT if scheme.activation_bits else PACKED


def scale_dtype(scheme: Scheme, model: torch.dtype) -> torch.dtype:
    """Of groups, the model's own: those scales are many. One per output channel is kept exact."""
    return model if scheme.group_size and model != torch.float16 else torch.float32


def stored_tensors(name: str, weight: AffineWeight, scheme: Scheme, scales: torch.dtype) -> dict[str, torch.Tensor]:
    """Of the layer `name`."""
    scales_FG = weight.scales_FG.to(scales)
    if format_of(scheme) != PACKED:
        return {f"{name}.weight": weight.codes_FE, f"{name}.weight_scale": scales_FG}
    symmetric = weight.offsets_FG is None
    # Codes with a zero point of their own are from 0 on in 4 bits, but in 8 around 0, see AffineWeight.
    shift = 2 ** (weight.bits - 1) if symmetric or weight.bits == 8 else 0
    tensors = {
        f"{name}.weight_packed": pack(weight.codes_FE.view(torch.uint8) + shift, weight.bits),
        f"{name}.weight_scale": scales_FG,
        f"{name}.weight_shape": torch.tensor(weight.get_shape()),
    }
    if weight.offsets_FG is not None:
        zeros_FG = (shift - weight.offsets_FG / weight.scales_FG).round().to(torch.uint8)
        tensors[f"{name}.weight_zero_point"] = pack(zeros_FG.t(), weight.bits).t().contiguous()
    return tensors


def quantization_config(scheme: Scheme, head: Scheme | None, plain: list[str]) -> dict[str, Any]:
    """`head`: that of embedding and head, if they are quantized. `plain`: layers that are not."""
    groups = {"group_0": _group(scheme, ["Linear"])}
    if head is not None and head == scheme:
        groups["group_0"]["targets"].append("Embedding")
    elif head is not None:
        groups["group_1"] = _group(head, ["Embedding", "re:.*lm_head"])
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    kind = "float" if scheme.is_float else "int"
    weights = {
        "num_bits": scheme.weight_bits,
        "type": kind,
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    quantizes_inputs = scheme.activation_bits or scheme.is_float
    return {
        "targets": targets,
        "format": format_of(scheme),
        "weights": weights,
        "input_activations": inputs if quantizes_inputs else None,
    }
