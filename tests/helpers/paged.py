"""Paged attention steps for tests, NaN wherever no token is, and dense attention in float64 as the oracle."""

# ruff: noqa: N802, N815 - names carry their shape

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from helpers.rotation import no_rotation
from helpers.step_batches import Tokens, batch_of, in_order
from tidewright.attention.base import AttentionLayer
from tidewright.attention.reference import ReferenceAttention
from tidewright.kv_cache.storage import LayerCache
from tidewright.step.batch import StepBatch

UNUSED = 10**6  # a block that does not exist: reading it crashes


@dataclass(frozen=True)
class Model:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Step:
    """`spans` in the order of their rows. The new tokens' keys and values are in the cache, too."""

    spans: tuple[Tokens, ...]
    qkv_TXD: torch.Tensor
    k_cache_NSKD: torch.Tensor
    v_cache_NSKD: torch.Tensor
    contexts: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # k_CKD and v_CKD of each sequence

    @property
    def kv_heads(self) -> int:
        return self.k_cache_NSKD.shape[2]

    @property
    def q_THD(self) -> torch.Tensor:
        """Part of a wider row, as in the engine."""
        return self.qkv_TXD[:, : -2 * self.kv_heads]

    @property
    def block_size(self) -> int:
        return self.k_cache_NSKD.shape[1]

    def batch(self) -> StepBatch:
        """Entries of the block tables that nothing may read name a block that does not exist."""
        batch = batch_of(self.spans, self.block_size)
        tables = batch.tables_PM.flatten()
        for span, (_, _, _, at) in zip(self.spans, batch.host_spans_B4.tolist(), strict=True):
            tables[at + len(span.block_table) : at + batch.tables_PM.shape[1]] = UNUSED
        return batch

    def exact(self, layer: AttentionLayer) -> torch.Tensor:
        """By numpy, in float64, each query alone: softmax over the keys up to its position, of those in the window."""
        q = self.q_THD.double().numpy()
        out, row = np.empty(q.shape), 0
        group = q.shape[1] // self.kv_heads
        for span, (k, v) in zip(self.spans, self.contexts, strict=True):
            k, v = (x.double().numpy() for x in (k, v))
            for end in range(span.start + 1, span.start + span.count + 1):
                first = 0 if layer.window is None else max(0, end - layer.window)
                for head in range(q.shape[1]):
                    scores = k[first:end, head // group] @ q[row, head] * layer.scale
                    if layer.softcap is not None:
                        scores = layer.softcap * np.tanh(scores / layer.softcap)
                    weights = np.exp(scores - scores.max())
                    out[row, head] = weights @ v[first:end, head // group] / weights.sum()
                row += 1
        return torch.from_numpy(out)

    def by_reference(self, layer: AttentionLayer) -> torch.Tensor:
        """The engine's own reference implementation, in the step's dtype."""
        cache = LayerCache(torch.nan_to_num(self.k_cache_NSKD), torch.nan_to_num(self.v_cache_NSKD))
        attention = ReferenceAttention(self.block_size, torch.device("cpu"))
        batch = batch_of(self.spans, self.block_size)
        attention.prepare(batch)
        return attention.forward(self.qkv_TXD, no_rotation(self.qkv_TXD), cache, batch, layer)


def make_step(model: Model, lengths: Sequence[tuple[int, int]], seed: int = 0) -> Step:
    """Sequences as (start, count), put into the order of a batch."""
    generator = torch.Generator().manual_seed(seed)
    size = model.block_size
    free = list(range(sum(-(-(start + count) // size) for start, count in lengths) + 3))
    random.Random(seed).shuffle(free)
    shape = (len(free), size, model.kv_heads, model.head_dim)
    k_cache_NSKD, v_cache_NSKD = (torch.full(shape, torch.nan, dtype=model.dtype) for _ in range(2))
    unordered = []
    for start, count in lengths:
        table = tuple(free.pop() for _ in range(-(-(start + count) // size)))
        unordered.append(Tokens(start, count, table))
    spans = in_order(unordered, size)
    contexts, rows = [], []
    for span in spans:
        end = span.start + span.count
        k_CKD, v_CKD = (torch.randn(end, *shape[2:], generator=generator).to(model.dtype) for _ in range(2))
        for cache, new in ((k_cache_NSKD, k_CKD), (v_cache_NSKD, v_CKD)):
            for i, block in enumerate(span.block_table):
                part = new[i * size : (i + 1) * size]
                cache[block, : len(part)] = part
        q_THD = torch.randn(span.count, model.heads, model.head_dim, generator=generator).to(model.dtype)
        rows.append(torch.cat((q_THD, k_CKD[span.start :], v_CKD[span.start :]), dim=1))
        contexts.append((k_CKD, v_CKD))
    return Step(tuple(spans), torch.cat(rows), k_cache_NSKD, v_cache_NSKD, tuple(contexts))
