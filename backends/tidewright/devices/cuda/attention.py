"""Attention by the kernels for GPUs: rotation with the cache write, then decodes and prefills over the paged cache."""

from __future__ import annotations

import torch

from tidewright.attention.base import Attention, AttentionLayer, Rotation
from tidewright.devices.cuda.paged_attention import PagedStep, paged_attention
from tidewright.devices.cuda.rope_and_cache import rotate_and_store
from tidewright.kv_cache.storage import LayerCache
from tidewright.step.batch import StepBatch


class PagedCudaAttention(Attention):
    """Sums are taken in float32."""

    _step: PagedStep

    def prepare(self, batch: StepBatch) -> None:
        self._step = PagedStep.of(batch)

    def forward(
        self,
        qkv_TXD: torch.Tensor,
        rotation: Rotation,
        cache: LayerCache,
        batch: StepBatch,
        layer: AttentionLayer,
    ) -> torch.Tensor:
        tables = rotation.cos_PD, rotation.sin_PD, rotation.positions_T
        q_THD = rotate_and_store(qkv_TXD, *tables, batch.slots_T, cache)
        return paged_attention(q_THD, cache, self._step, layer)
