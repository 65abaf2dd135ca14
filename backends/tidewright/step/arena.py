"""One piece of memory for many small arrays, so that all of a step's numbers reach the device in one transfer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

_ALIGNMENT = 64  # bytes; a cache line


class Arena:
    """Named one-dimensional arrays, given as (type, length).

    Staged: the host writes its copy, pinned where there is CUDA, and `upload` sends all of it. Otherwise host and
    device are the same memory. Before the host writes again, the device must have received the last upload.
    """

    def __init__(self, arrays: Mapping[str, tuple[np.dtype, int]], device: torch.device, staged: bool) -> None:
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, length) in arrays.items():
            places[name] = end, end + dtype.itemsize * length
            end += -(-dtype.itemsize * length // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device) if staged else self._host
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, torch.Tensor] = {}
        for name, (dtype, _) in arrays.items():
            first, last = places[name]
            self.host[name] = self._host[first:last].numpy().view(dtype)
            self.device[name] = self._device[first:last].view(torch_dtype(dtype))

    def upload(self) -> None:
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
