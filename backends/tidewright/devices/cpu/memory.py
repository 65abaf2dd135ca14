"""A machine's memory, in huge pages, which are cleared when they are first used."""

from __future__ import annotations

import math

import torch
from torch import nn

from tidewright.devices.cpu.huge_pages import HugePages, huge_empty, move_to_huge_pages, release_pages
from tidewright.devices.memory import DeviceMemory
from tidewright.kv_cache.budget import AUTO_CPU
from tidewright.memory.machine import machine_memory


class CpuMemory(DeviceMemory):
    kv_budget = AUTO_CPU
    is_bounded = False
    reserves = True

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.weights = HugePages()
        """For weights that get their memory as they are loaded."""

    def free(self) -> int:
        return machine_memory().free

    def capacity(self) -> int:
        return machine_memory().total

    def trim(self) -> None:
        """What the C library keeps serves the next step."""

    def zeros(self, dimensions: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """To write a gigabyte of zeros would take a second, at each start: the kernel's pages are zero as they come."""
        return huge_empty(math.prod(dimensions) * dtype.itemsize, reserves=True).view(dtype).view(dimensions)

    def release(self, tensor: torch.Tensor) -> None:
        release_pages(tensor)

    def place_weights(self, model: nn.Module) -> None:
        move_to_huge_pages(model)
