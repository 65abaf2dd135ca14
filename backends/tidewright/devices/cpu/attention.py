"""Attention by the C++ kernels on a CPU: every step in one call, the cache read in place."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tidewright.attention.base import Attention, AttentionLayer, Rotation, Span
from tidewright.devices.cpu.kernels import kernels_for


@dataclass(frozen=True)
class NativeMetadata:
    slots_T: torch.Tensor  # where each new token's k and v go: block * block_size + offset
    spans_B4: torch.Tensor  # for the kernel: first row, start, count, place of the block table in `tables`
    tables: torch.Tensor


class NativeCpuAttention(Attention[NativeMetadata]):
    """For float32 and bfloat16, where the kernels load (`available`). Sums are taken in float32."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size

    def order(self, span: Span) -> tuple[Any, ...]:
        """Single tokens first; who begins with the same blocks side by side: the kernel reads those once for all."""
        return span.count > 1, span.block_table

    def prepare(self, spans: Sequence[Span]) -> NativeMetadata:
        size = self.block_size
        slots: list[int] = []
        numbers: list[int] = []
        tables: list[int] = []
        for span in spans:
            table, end = span.block_table, span.start + span.count
            numbers += (len(slots), span.start, span.count, len(tables))
            slots += [table[position // size] * size + position % size for position in range(span.start, end)]
            tables += table[: -(-end // size)]
        return NativeMetadata(
            torch.tensor(slots, dtype=torch.int64),
            torch.tensor(numbers, dtype=torch.int32).view(-1, 4),
            torch.tensor(tables, dtype=torch.int32),
        )

    def forward(
        self,
        qkv_TXD: torch.Tensor,
        rotation: Rotation,
        k_cache_NSKD: torch.Tensor,
        v_cache_NSKD: torch.Tensor,
        metadata: NativeMetadata,
        layer: AttentionLayer,
    ) -> torch.Tensor:
        native = kernels_for(qkv_TXD)
        assert native
        q_THD = native.rotate_and_store(
            qkv_TXD,
            rotation.cos_PD,
            rotation.sin_PD,
            rotation.positions_T,
            metadata.slots_T,
            k_cache_NSKD,
            v_cache_NSKD,
        )
        return native.paged_attention(
            q_THD,
            k_cache_NSKD,
            v_cache_NSKD,
            metadata.spans_B4,
            metadata.tables,
            layer.scale,
            layer.window or 0,
            layer.softcap or 0.0,
        )
