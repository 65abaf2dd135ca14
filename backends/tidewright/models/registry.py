"""From the architecture that config.json names to the class that computes it. What config.json says: families.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidewright.models.families import architecture
from tidewright.models.gemma import GemmaForCausalLM
from tidewright.models.llama import LlamaForCausalLM

_CLASSES = {"Gemma2ForCausalLM": GemmaForCausalLM, "Gemma3ForCausalLM": GemmaForCausalLM}


def model_class(config: Mapping[str, Any]) -> type[LlamaForCausalLM]:
    """Raises ModelConfigError, with the supported names, for an architecture that is not supported."""
    return _CLASSES.get(architecture(config), LlamaForCausalLM)
