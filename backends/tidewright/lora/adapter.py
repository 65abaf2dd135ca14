"""An adapter in memory: what it adds to each projection of a model, this rank's part of it."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class LowRank:
    """Adds scale * (x A^T) B^T to a projection. In the model's type; B lies transposed."""

    a_RE: torch.Tensor
    b_RF: torch.Tensor
    scale: float
    rank: int


@dataclass(frozen=True, eq=False)
class Update:
    """A `LowRank` as one kind of device takes it: its LoRA layer has made it, and alone knows how its numbers lie."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    rank: int


@dataclass(frozen=True, eq=False)
class Adapter:
    digest: str  # of its files, so the same for all ranks
    rank: int  # the highest
    updates: Mapping[str, Update]  # by projection, as the model names them

    @property
    def nbytes(self) -> int:
        """On this rank."""
        return sum(update.a.nbytes + update.b.nbytes for update in self.updates.values())
