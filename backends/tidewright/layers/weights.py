"""Weights as they lie on the disk, and how a layer's own weight is filled from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn


class WeightShapeError(ValueError):
    """A checkpoint's weight has another shape than config.json announces."""


class WeightSlice(Protocol):
    """A tensor that is still on disk, as safetensors' `get_slice` gives it: an index reads only that part."""

    def get_shape(self) -> list[int]: ...
    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor: ...


Loader = Callable[[WeightSlice], None]


def checked(source: WeightSlice, *shape: int) -> WeightSlice:
    """Raises WeightShapeError."""
    if tuple(source.get_shape()) != shape:
        raise WeightShapeError(f"expected shape {shape}, found {tuple(source.get_shape())}")
    return source


def replicated_loader(weight: nn.Parameter, plus: float = 0.0) -> Loader:
    """Loads a weight that every rank holds whole, such as that of a norm. `plus` is added in the weight's own type."""

    def load(source: WeightSlice) -> None:
        weight.copy_(checked(source, *weight.shape)[tuple(slice(None) for _ in weight.shape)])
        if plus:
            weight.add_(plus)

    return load


def not_here(source: WeightSlice) -> None:
    """Of a weight that only another rank holds."""
