"""The attention implementations by the name that the configuration uses."""

from __future__ import annotations

from typing import Any

import torch

from tidewright.attention.base import Attention
from tidewright.attention.reference import ReferenceAttention

_IMPLEMENTATIONS = {"reference": ReferenceAttention}


class UnknownAttentionError(ValueError):
    """The configuration names no attention implementation that there is."""


def make_attention(name: str, block_size: int, device: torch.device) -> Attention[Any]:
    """Raises UnknownAttentionError. "auto" takes the fastest that the device has."""
    if name == "auto":
        name = "reference"
    if name not in _IMPLEMENTATIONS:
        known = ", ".join(sorted(_IMPLEMENTATIONS))
        raise UnknownAttentionError(f"attention {name!r} does not exist; there is: {known}")
    return _IMPLEMENTATIONS[name](block_size, device)
