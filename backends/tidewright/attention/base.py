"""What every attention implementation offers: writing new keys and values, and causal attention over the cache."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from tidewright.kv_cache.storage import LayerCache
from tidewright.step.batch import StepBatch


@dataclass(frozen=True)
class AttentionLayer:
    """What attention needs to know of a layer. `window`: a token sees itself and the window - 1 before it."""

    scale: float
    window: int | None = None
    softcap: float | None = None  # softcap * tanh(score / softcap), as in Gemma 2


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary position embedding of a step's tokens: float32 tables by position, and the tokens' positions.

    The first half of a sine's row carries the minus sign of the rotation.
    """

    cos_PD: torch.Tensor
    sin_PD: torch.Tensor
    positions_T: torch.Tensor
    _made: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # by the first layer

    def apply(self, x_THD: torch.Tensor) -> torch.Tensor:
        """All heads turned, in plain torch."""
        cos_T1D, sin_T1D = self._of_dtype(x_THD.dtype)
        first, second = x_THD.chunk(2, dim=-1)
        return torch.addcmul(x_THD * cos_T1D, torch.cat((second, first), dim=-1), sin_T1D)

    def _of_dtype(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if dtype not in self._made:
            tables = self.cos_PD[self.positions_T, None], self.sin_PD[self.positions_T, None]
            self._made[dtype] = tables[0].to(dtype), tables[1].to(dtype)
        return self._made[dtype]


class Attention(ABC):
    """Rotation of queries and keys, and causal grouped-query attention over a paged cache."""

    def prepare(self, batch: StepBatch) -> None:  # noqa: B027 - only some have something to do
        """Runs once a step, before `forward` of the first layer: for what all layers share."""

    @abstractmethod
    def forward(
        self,
        qkv_TXD: torch.Tensor,
        rotation: Rotation,
        cache: LayerCache,
        batch: StepBatch,
        layer: AttentionLayer,
    ) -> torch.Tensor:
        """Takes the heads of q, k and v side by side, q and k not yet rotated.

        Writes the rotated k, and v, into the cache in place; returns the attention output o_THD.
        """
