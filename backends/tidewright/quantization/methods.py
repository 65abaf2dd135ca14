"""How config.json says that its weights are quantized. No torch: the command line reads it, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AWQ, COMPRESSED_TENSORS, FP8, GPTQ = "awq", "compressed-tensors", "fp8", "gptq"
METHODS = (AWQ, COMPRESSED_TENSORS, FP8, GPTQ)


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """config.json's `quantization_config`; None if the weights are plain."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(found, Mapping):
        return None
    return {**found, "quant_method": str(found.get("quant_method", "missing")).lower()}


def unsupported(config: Mapping[str, Any]) -> str | None:
    """What to say of a quantization that isn't served at all."""
    found = quantization_of(config)
    if found is None:
        return None
    method = found["quant_method"]
    if method not in METHODS:
        return (
            f"config.json's quantization_config has quant_method {method!r}, which is not supported; there is "
            f"{', '.join(METHODS)}. Take such a checkpoint, or run `tidewright quantize` on the original model"
        )
    if method == FP8 and found.get("weight_block_size"):
        return "fp8 weights with a scale per block (weight_block_size) are not supported, only per channel or tensor"
    return None
