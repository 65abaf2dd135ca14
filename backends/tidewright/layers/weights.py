"""Weights as they lie on the disk, and how a layer's own weight is filled from them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
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


def weight_bytes(model: nn.Module) -> int:
    """What a loaded model takes, wherever its layers keep their weights: in parameters, or in objects of their own."""
    sizes = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        values = [value for value in vars(module).values() if not isinstance(value, nn.Module)]
        for kept in chain(values, *(value for value in values if isinstance(value, list))):
            parts = [kept] if hasattr(kept, "nbytes") else getattr(kept, "__dict__", {}).values()
            sizes |= {id(part): part.nbytes for part in parts if isinstance(getattr(part, "nbytes", None), int)}
    return sum(sizes.values())


def not_here(source: WeightSlice) -> None:
    """Of a weight that only another rank holds."""
