"""Attention in plain torch, on any device: the oracle of the faster implementations, and the default."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from tidewright.attention.base import Attention, AttentionLayer, Span


@dataclass(frozen=True)
class _DecodeGroup:
    """Single-token sequences of similar length, attended to in one padded call (M blocks each)."""

    rows: slice  # of the step's tokens
    blocks_BM: torch.Tensor
    mask_B11C: torch.Tensor  # True where there is a token


@dataclass(frozen=True)
class _Prefill:
    """Several new tokens of one sequence. Without earlier tokens, no block needs to be read."""

    rows: slice
    context: int
    blocks_M: torch.Tensor | None
    mask_TC: torch.Tensor | None


@dataclass(frozen=True)
class ReferenceMetadata:
    slots_T: torch.Tensor  # where each new token's k and v go: block * block_size + offset
    decodes: tuple[_DecodeGroup, ...]
    prefills: tuple[_Prefill, ...]


class ReferenceAttention(Attention[ReferenceMetadata]):
    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device

    def prepare(self, spans: Sequence[Span]) -> ReferenceMetadata:
        size = self.block_size
        slots = [
            span.block_table[position // size] * size + position % size
            for span in spans
            for position in range(span.start, span.start + span.count)
        ]
        # Contexts within a factor of two share a call: few calls, and at most half of one is padding.
        decodes, first = [], 0
        singles = (span for span in spans if span.count == 1)
        for _, members in groupby(singles, key=lambda span: self._num_blocks(span).bit_length()):
            group = list(members)
            decodes.append(self._decode_group(group, first))
            first += len(group)
        prefills = []
        for span in spans[first:]:
            prefills.append(self._prefill(span, first))
            first += span.count
        return ReferenceMetadata(self._tensor(slots), tuple(decodes), tuple(prefills))

    def forward(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_NSKD: torch.Tensor,
        v_cache_NSKD: torch.Tensor,
        metadata: ReferenceMetadata,
        layer: AttentionLayer,
    ) -> torch.Tensor:
        k_cache_NSKD.flatten(0, 1).index_copy_(0, metadata.slots_T, k_TKD)
        v_cache_NSKD.flatten(0, 1).index_copy_(0, metadata.slots_T, v_TKD)
        out_THD = torch.empty_like(q_THD)
        for group in metadata.decodes:
            out_THD[group.rows] = _decode(q_THD[group.rows], k_cache_NSKD, v_cache_NSKD, group)
        for prefill in metadata.prefills:
            rows = prefill.rows
            if prefill.blocks_M is None:
                k_CKD, v_CKD = k_TKD[rows], v_TKD[rows]
            else:
                k_CKD = _read(k_cache_NSKD, prefill.blocks_M)[: prefill.context]
                v_CKD = _read(v_cache_NSKD, prefill.blocks_M)[: prefill.context]
            out_THD[rows] = _causal(q_THD[rows], k_CKD, v_CKD, prefill.mask_TC)
        return out_THD

    def _num_blocks(self, span: Span) -> int:
        return -(-(span.start + span.count) // self.block_size)

    def _decode_group(self, group: list[Span], first: int) -> _DecodeGroup:
        width = max(self._num_blocks(span) for span in group)
        tables = [list(span.block_table[: self._num_blocks(span)]) for span in group]
        contexts_B = self._tensor([span.start + 1 for span in group])
        mask_BC = torch.arange(width * self.block_size, device=self.device) < contexts_B[:, None]
        return _DecodeGroup(
            rows=slice(first, first + len(group)),
            # A row is padded with its own first block: what it reads there is masked, and finite.
            blocks_BM=self._tensor([table + table[:1] * (width - len(table)) for table in tables]),
            mask_B11C=mask_BC[:, None, None, :],
        )

    def _prefill(self, span: Span, first: int) -> _Prefill:
        rows = slice(first, first + span.count)
        context = span.start + span.count
        if span.start == 0:
            return _Prefill(rows, context, blocks_M=None, mask_TC=None)
        positions_T = torch.arange(span.start, context, device=self.device)
        return _Prefill(
            rows,
            context,
            blocks_M=self._tensor(list(span.block_table[: self._num_blocks(span)])),
            mask_TC=torch.arange(context, device=self.device) <= positions_T[:, None],
        )

    def _tensor(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _read(cache_NSKD: torch.Tensor, blocks_M: torch.Tensor) -> torch.Tensor:
    """The blocks' tokens, one after the other."""
    return cache_NSKD.index_select(0, blocks_M).flatten(0, 1)


def _decode(
    q_BHD: torch.Tensor, k_cache_NSKD: torch.Tensor, v_cache_NSKD: torch.Tensor, group: _DecodeGroup
) -> torch.Tensor:
    batch, heads, head_dim = q_BHD.shape
    kv_heads = k_cache_NSKD.shape[2]
    # The query heads that share a KV head take the place of a sequence of queries (G of them): no K or V is copied.
    q_BKGD = q_BHD.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    blocks = group.blocks_BM.flatten()
    k_BKCD = _read(k_cache_NSKD, blocks).view(batch, -1, kv_heads, head_dim).transpose(1, 2)
    v_BKCD = _read(v_cache_NSKD, blocks).view(batch, -1, kv_heads, head_dim).transpose(1, 2)
    out_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKCD, v_BKCD, attn_mask=group.mask_B11C)
    return out_BKGD.reshape(batch, heads, head_dim)


def _causal(
    q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, mask_TC: torch.Tensor | None
) -> torch.Tensor:
    out_1HTD = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        k_CKD.transpose(0, 1)[None],
        v_CKD.transpose(0, 1)[None],
        attn_mask=mask_TC,
        is_causal=mask_TC is None,
        enable_gqa=True,
    )
    return out_1HTD[0].transpose(0, 1)
