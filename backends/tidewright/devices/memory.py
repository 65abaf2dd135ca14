"""A device's memory, as weights and KV cache take it; here as torch knows it of a GPU."""

from __future__ import annotations

import torch
from torch import nn

from tidewright.kv_cache.budget import AUTO_GPU


class DeviceMemory:
    kv_budget = AUTO_GPU
    """What `kv_cache_memory: auto` stands for."""

    def __init__(self, torch_device: torch.device) -> None:
        self._torch_device = torch_device

    def __str__(self) -> str:
        return str(self._torch_device)

    def free(self) -> int:
        """Bytes."""
        return torch.cuda.mem_get_info(self._torch_device)[0]

    def zeros(self, dimensions: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(dimensions, dtype=dtype, device=self._torch_device)

    def place_weights(self, model: nn.Module) -> None:
        """To be called before they are loaded."""
