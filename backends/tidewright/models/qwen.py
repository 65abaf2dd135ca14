"""Qwen 2, 2.5 and 3: Llama with biases on q, k and v (2), or norms on the heads of q and k (3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tidewright.models.config import DecoderConfig


def read_qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    return replace(_read(config), qkv_bias=True, output_bias=False)


def read_qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    return replace(_read({"head_dim": 128, **config}), qk_norm=True)


def _read(config: Mapping[str, Any]) -> DecoderConfig:
    """The layers from max_window_layers on have the window, if there is to be one at all."""
    config = {"sliding_window": 4096, "max_window_layers": 28, **config}
    if not config.get("use_sliding_window"):
        config["sliding_window"] = None
    return DecoderConfig.from_json(
        config, slides=lambda layer: config["sliding_window"] is not None and layer >= config["max_window_layers"]
    )
