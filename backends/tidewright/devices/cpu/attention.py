"""Attention by the C++ kernels on a CPU: every step in one call, the cache read in place."""

from __future__ import annotations

import torch

from tidewright.attention.base import Attention, AttentionLayer, Rotation
from tidewright.devices.cpu.kernels import kernels_for
from tidewright.kv_cache.storage import LayerCache
from tidewright.step.batch import StepBatch


class NativeCpuAttention(Attention):
    """For float32 and bfloat16, where the kernels load (`available`). Sums are taken in float32.

    A cache of the same type, or a quantized one, whose codes are read in registers.

    Sequences that begin with the same blocks lie side by side in the batch: the kernel reads those once for all.
    """

    def forward(
        self,
        qkv_TXD: torch.Tensor,
        rotation: Rotation,
        cache: LayerCache,
        batch: StepBatch,
        layer: AttentionLayer,
    ) -> torch.Tensor:
        native = kernels_for(qkv_TXD)
        assert native
        q_THD = native.rotate_and_store(
            qkv_TXD,
            rotation.cos_PD,
            rotation.sin_PD,
            rotation.positions_T,
            batch.slots_T,
            cache,
        )
        return native.paged_attention(
            q_THD,
            cache,
            batch.spans_B4,
            batch.tables_PM,
            layer.scale,
            layer.window or 0,
            layer.softcap or 0.0,
        )
