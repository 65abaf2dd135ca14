"""The norm that all families use."""

from __future__ import annotations

import torch
from torch import nn

from tidewright.devices.base import Device
from tidewright.layers.weights import Loader, replicated_loader


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019. `adds_one`: the checkpoint has the weight less 1, as Gemma's."""

    def __init__(self, size: int, eps: float, adds_one: bool, device: Device) -> None:
        super().__init__()
        # 1 + weight is kept in float32: the small weights would vanish in a sum of fewer digits.
        dtype = torch.float32 if adds_one else None
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.offset = 1.0 if adds_one else 0.0
        self.eps = eps
        self._device = device

    def loader(self) -> Loader:
        return replicated_loader(self.weight, self.offset)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self._device.rms_norm(x_TE, self.weight, self.eps)

    def add(self, x_TE: torch.Tensor, residual_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds x to the residual stream; returns the norm of the stream, and the stream."""
        return self._device.add_rms_norm(x_TE, residual_TE, self.weight, self.eps)
