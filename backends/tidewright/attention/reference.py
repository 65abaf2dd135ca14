"""Attention in plain torch, on any device: the oracle of the faster implementations, and the default."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tidewright.attention.base import Attention, AttentionLayer, Rotation
from tidewright.kv_cache.quantized import dequantize, quantize
from tidewright.kv_cache.storage import LayerCache
from tidewright.step.batch import StepBatch


@dataclass(frozen=True)
class _DecodeGroup:
    """Single-token sequences of similar length, attended to in one padded call (M blocks each)."""

    rows_B: torch.Tensor  # of the step's tokens
    blocks_BM: torch.Tensor
    contexts_B: torch.Tensor
    width: int  # tokens in M blocks
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """mask_B11C: True where there is a token to see. Made in the step's first layer with this window, then kept."""
        window = _narrower(window, self.width)
        if window not in self.masks:
            positions_C = torch.arange(self.width, device=self.contexts_B.device)
            mask_BC = positions_C < self.contexts_B[:, None]
            if window is not None:
                mask_BC &= positions_C >= self.contexts_B[:, None] - window
            self.masks[window] = mask_BC[:, None, None, :]
        return self.masks[window]


@dataclass(frozen=True)
class _Prefill:
    """Several new tokens of one sequence. Without earlier tokens, no block needs to be read."""

    rows: slice
    start: int
    context: int
    blocks_M: torch.Tensor | None
    device: torch.device
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def is_plain(self, layer: AttentionLayer) -> bool:
        """Torch knows the causal mask of a whole sequence, and needs none from here."""
        return self.blocks_M is None and _narrower(layer.window, self.context) is None and layer.softcap is None

    def mask(self, window: int | None) -> torch.Tensor:
        """mask_TC, made and kept in the same way."""
        window = _narrower(window, self.context)
        if window not in self.masks:
            positions_C = torch.arange(self.context, device=self.device)
            positions_T1 = positions_C[self.start :, None]
            mask_TC = positions_C <= positions_T1
            if window is not None:
                mask_TC &= positions_C > positions_T1 - window
            self.masks[window] = mask_TC
        return self.masks[window]


def _narrower(window: int | None, context: int) -> int | None:
    """None if the window hides nothing of such a context."""
    return None if window is None or window >= context else window


class ReferenceAttention(Attention):
    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        # Of the step.
        self.decodes: list[_DecodeGroup] = []
        self.prefills: list[_Prefill] = []

    def prepare(self, batch: StepBatch) -> None:
        # Contexts within a factor of two share a call: few calls, and at most half of one is padding.
        groups: dict[int, list[int]] = {}
        spans = batch.host_spans_B4.tolist()
        for index, (_, start, _, _) in enumerate(spans[: batch.num_decodes]):
            groups.setdefault(self._num_blocks(start + 1).bit_length(), []).append(index)
        self.decodes = [self._decode_group(batch, groups[size]) for size in sorted(groups)]
        self.prefills = [
            self._prefill(batch, index, first, start, count)
            for index, (first, start, count, _) in enumerate(spans)
            if index >= batch.num_decodes
        ]

    def forward(
        self,
        qkv_TXD: torch.Tensor,
        rotation: Rotation,
        cache: LayerCache,
        batch: StepBatch,
        layer: AttentionLayer,
    ) -> torch.Tensor:
        kv_heads = cache.num_kv_heads
        # q and k lie side by side, so both turn in one go.
        qk_TXD, v_TKD = rotation.apply(qkv_TXD[:, :-kv_heads]), qkv_TXD[:, -kv_heads:]
        q_THD, k_TKD = qk_TXD[:, :-kv_heads], qk_TXD[:, -kv_heads:]
        # What is read is what was stored, so a result does not depend on how a prompt was cut into chunks.
        k_TKD = _store(cache.keys_NSKD, cache.key_scales_NKS, batch.slots_T, k_TKD)
        v_TKD = _store(cache.values_NSKD, cache.value_scales_NKS, batch.slots_T, v_TKD)
        out_THD = torch.empty_like(q_THD)
        for group in self.decodes:
            out_THD[group.rows_B] = _decode(q_THD[group.rows_B], cache, group, layer)
        for prefill in self.prefills:
            rows = prefill.rows
            if prefill.blocks_M is None:
                k_CKD, v_CKD = k_TKD[rows], v_TKD[rows]
            else:
                k_CKD, v_CKD = (x[: prefill.context] for x in _read(cache, prefill.blocks_M, q_THD.dtype))
            mask_TC = None if prefill.is_plain(layer) else prefill.mask(layer.window)
            out_THD[rows] = _causal(q_THD[rows], k_CKD, v_CKD, mask_TC, layer)
        return out_THD

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _decode_group(self, batch: StepBatch, indices: list[int]) -> _DecodeGroup:
        """Of the sequences with these numbers, whose rows have the same numbers."""
        rows_B = torch.tensor(indices, device=self.device)
        width = self._num_blocks(int(batch.host_spans_B4[indices, 1].max()) + 1)
        blocks_BM = batch.tables_PM[batch.places_B[rows_B], :width].long()
        contexts_B = batch.lengths_B[rows_B].long()
        is_block_BM = torch.arange(width, device=self.device) * self.block_size < contexts_B[:, None]
        return _DecodeGroup(
            rows_B=rows_B,
            # A row is padded with its own first block: what it reads there is masked, and finite.
            blocks_BM=torch.where(is_block_BM, blocks_BM, blocks_BM[:, :1]),
            contexts_B=contexts_B,
            width=width * self.block_size,
        )

    def _prefill(self, batch: StepBatch, index: int, first: int, start: int, count: int) -> _Prefill:
        context = start + count
        blocks_M = batch.tables_PM[batch.places_B[index], : self._num_blocks(context)].long() if start else None
        return _Prefill(
            rows=slice(first, first + count),
            start=start,
            context=context,
            blocks_M=blocks_M,
            device=self.device,
        )


def _store(
    cache_NSKD: torch.Tensor, scales_NKS: torch.Tensor | None, slots_T: torch.Tensor, x_TKD: torch.Tensor
) -> torch.Tensor:
    """Returns what a later step will read of it."""
    if scales_NKS is None:
        stored_TKD = x_TKD.to(cache_NSKD.dtype)
        cache_NSKD.flatten(0, 1).index_copy_(0, slots_T, stored_TKD)
        return stored_TKD.to(x_TKD.dtype)
    codes_TKD, scales_TK = quantize(x_TKD, cache_NSKD.dtype)
    # As bytes, because torch copies no rows of float8.
    cache_NSKD.view(torch.uint8).flatten(0, 1).index_copy_(0, slots_T, codes_TKD.view(torch.uint8))
    block_size = cache_NSKD.shape[1]
    scales_NKS[slots_T // block_size, :, slots_T % block_size] = scales_TK
    return dequantize(codes_TKD, scales_TK, x_TKD.dtype)


def _read(cache: LayerCache, blocks_M: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the blocks' tokens, one after the other."""

    def read(cache_NSKD: torch.Tensor, scales_NKS: torch.Tensor | None) -> torch.Tensor:
        if scales_NKS is None:
            return cache_NSKD.index_select(0, blocks_M).flatten(0, 1).to(dtype)
        codes_MSKD = cache_NSKD.view(torch.uint8).index_select(0, blocks_M).view(cache_NSKD.dtype)
        scales_MSK = scales_NKS.index_select(0, blocks_M).transpose(1, 2)
        return dequantize(codes_MSKD, scales_MSK, dtype).flatten(0, 1)

    return read(cache.keys_NSKD, cache.key_scales_NKS), read(cache.values_NSKD, cache.value_scales_NKS)


def _decode(q_BHD: torch.Tensor, cache: LayerCache, group: _DecodeGroup, layer: AttentionLayer) -> torch.Tensor:
    batch, heads, head_dim = q_BHD.shape
    kv_heads = cache.num_kv_heads
    # The query heads that share a KV head take the place of a sequence of queries (G of them): no K or V is copied.
    q_BKGD = q_BHD.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    k_BKCD, v_BKCD = (
        x.view(batch, -1, kv_heads, head_dim).transpose(1, 2)
        for x in _read(cache, group.blocks_BM.flatten(), q_BHD.dtype)
    )
    out_BKGD = _attend(q_BKGD, k_BKCD, v_BKCD, group.mask(layer.window), layer)
    return out_BKGD.reshape(batch, heads, head_dim)


def _causal(
    q_THD: torch.Tensor,
    k_CKD: torch.Tensor,
    v_CKD: torch.Tensor,
    mask_TC: torch.Tensor | None,
    layer: AttentionLayer,
) -> torch.Tensor:
    q_1HTD, k_1KCD, v_1KCD = (x.transpose(0, 1)[None] for x in (q_THD, k_CKD, v_CKD))
    return _attend(q_1HTD, k_1KCD, v_1KCD, mask_TC, layer)[0].transpose(0, 1)


def _attend(
    q_BHTD: torch.Tensor,
    k_BKCD: torch.Tensor,
    v_BKCD: torch.Tensor,
    mask: torch.Tensor | None,
    layer: AttentionLayer,
) -> torch.Tensor:
    """Without a mask: causal, over queries and keys of the same positions."""
    group = q_BHTD.shape[1] // k_BKCD.shape[1]
    if layer.softcap is None:
        return F.scaled_dot_product_attention(
            q_BHTD,
            k_BKCD,
            v_BKCD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=layer.scale,
            enable_gqa=group > 1,
        )
    assert mask is not None
    k_BHCD, v_BHCD = (x.repeat_interleave(group, dim=1) for x in (k_BKCD, v_BKCD))
    scores_BHTC = layer.softcap * torch.tanh(q_BHTD @ k_BHCD.mT * (layer.scale / layer.softcap))
    scores_BHTC = scores_BHTC.masked_fill(~mask, -torch.inf)
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    return scores_BHTC.softmax(dim=-1, dtype=wide).to(q_BHTD.dtype) @ v_BHCD
