"""The attention implementations by the name that the configuration uses."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tidewright.attention.base import Attention
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.cpu.attention import NativeCpuAttention
from tidewright.devices.cpu.kernels import kernels_of

_IMPLEMENTATIONS: dict[str, Callable[[int, torch.device], Attention]] = {
    "native": lambda block_size, device: NativeCpuAttention(),
    "reference": ReferenceAttention,
}


class UnknownAttentionError(ValueError):
    """The configuration names no attention implementation that there is, or none that works here."""


def make_attention(name: str, block_size: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """Raises UnknownAttentionError. "auto" takes the fastest that the device has for `dtype`."""
    native = device.type == "cpu" and kernels_of(dtype) is not None
    if name == "auto":
        name = "native" if native else "reference"
    if name not in _IMPLEMENTATIONS:
        known = ", ".join(sorted(_IMPLEMENTATIONS))
        raise UnknownAttentionError(f"attention {name!r} does not exist; there is: {known}")
    if name == "native" and not native:
        raise UnknownAttentionError(
            f"attention 'native' needs a CPU, float32 or bfloat16, and a C++ compiler, not {device} and {dtype}"
            " (the log tells if the compiler failed); choose 'auto'"
        )
    return _IMPLEMENTATIONS[name](block_size, device)
