"""From the architecture that config.json names to the class that computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidewright.models.config import ModelConfigError
from tidewright.models.llama import LlamaForCausalLM

_ARCHITECTURES = {"LlamaForCausalLM": LlamaForCausalLM}


def model_class(config: Mapping[str, Any]) -> type[LlamaForCausalLM]:
    """Raises ModelConfigError, with the supported names, for an architecture that is not supported."""
    names = config.get("architectures") or []
    for name in names:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    supported = ", ".join(sorted(_ARCHITECTURES))
    raise ModelConfigError(f"architecture {', '.join(names) or 'missing'} is not supported; there is: {supported}")
