"""From the architecture that config.json names to what it says. No torch: the command line reads it, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tidewright.models.config import DecoderConfig, ModelConfigError
from tidewright.models.gemma_config import read_gemma2, read_gemma3
from tidewright.models.mistral import read_mistral
from tidewright.models.qwen import read_qwen2, read_qwen3

READERS: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "Gemma2ForCausalLM": read_gemma2,
    "Gemma3ForCausalLM": read_gemma3,
    "LlamaForCausalLM": DecoderConfig.from_json,
    "MistralForCausalLM": read_mistral,
    "Qwen2ForCausalLM": read_qwen2,
    "Qwen3ForCausalLM": read_qwen3,
}


def architecture(config: Mapping[str, Any]) -> str:
    """Raises ModelConfigError, with the supported names, for an architecture that is not supported."""
    names = config.get("architectures") or []
    names = [str(name) for name in (names if isinstance(names, list) else [names])]
    for name in names:
        if name in READERS:
            return name
    supported = ", ".join(sorted(READERS))
    raise ModelConfigError(f"architecture {', '.join(names) or 'missing'} is not supported; there is: {supported}")


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Raises ModelConfigError."""
    return READERS[architecture(config)](config)
