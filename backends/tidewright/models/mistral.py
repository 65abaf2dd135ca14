"""Mistral: Llama whose tokens, in the first models, see no further back than a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidewright.models.config import DecoderConfig


def read_mistral(config: Mapping[str, Any]) -> DecoderConfig:
    config = {"sliding_window": 4096, **config}  # later models set it to null
    return DecoderConfig.from_json(config, slides=lambda layer: config["sliding_window"] is not None)
