"""A checkpoint's tensor as layers read it: a `WeightSlice` that counts how much of it is read."""

from __future__ import annotations

import torch


class OnDisk:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.values_read = tensor, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        part = self.tensor[index]
        self.values_read += part.numel()
        return part
