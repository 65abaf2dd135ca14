"""From the architecture that config.json names to the class that computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidewright.models.config import ModelConfigError
from tidewright.models.gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from tidewright.models.llama import LlamaForCausalLM
from tidewright.models.mistral import MistralForCausalLM
from tidewright.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM

_ARCHITECTURES: dict[str, type[LlamaForCausalLM]] = {
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def model_class(config: Mapping[str, Any]) -> type[LlamaForCausalLM]:
    """Raises ModelConfigError, with the supported names, for an architecture that is not supported."""
    names = config.get("architectures") or []
    for name in names:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    supported = ", ".join(sorted(_ARCHITECTURES))
    raise ModelConfigError(f"architecture {', '.join(names) or 'missing'} is not supported; there is: {supported}")
