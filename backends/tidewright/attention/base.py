"""What every attention implementation offers: writing new keys and values, and causal attention over the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

Metadata = TypeVar("Metadata")


class Span(Protocol):
    """`count` new tokens of one sequence, from position `start`; block_table[i] holds positions i*S … i*S+S-1."""

    @property
    def start(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def block_table(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class AttentionLayer:
    """What attention needs to know of a layer. `window`: a token sees itself and the window - 1 before it."""

    scale: float
    window: int | None = None
    softcap: float | None = None  # softcap * tanh(score / softcap), as in Gemma 2


class Attention(ABC, Generic[Metadata]):
    """Causal grouped-query attention over a paged cache.

    `prepare` runs once a step and does all the bookkeeping, so that `forward`, once a layer, is tensor work only.
    """

    @abstractmethod
    def prepare(self, spans: Sequence[Span]) -> Metadata:
        """`spans` in the order in which their tokens lie in the step, by `span_order`."""

    @abstractmethod
    def forward(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_NSKD: torch.Tensor,
        v_cache_NSKD: torch.Tensor,
        metadata: Metadata,
        layer: AttentionLayer,
    ) -> torch.Tensor:
        """Writes the new k and v into the cache in place; returns the attention output o_THD."""


def span_order(span: Span) -> tuple[bool, int]:
    """Sort key: single tokens first, short contexts before long, so that similar work lies side by side."""
    return span.count > 1, len(span.block_table)
