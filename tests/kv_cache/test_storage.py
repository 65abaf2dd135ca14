"""kv_cache/storage.py: the number of blocks follows from the budget; budgets that can't work are refused."""

from __future__ import annotations

import psutil
import pytest
import torch

from tidewright.devices.cpu.memory import CpuMemory
from tidewright.kv_cache.storage import KVCacheMemoryError, KVCacheShape, allocate_kv_cache, count_blocks

SHAPE = KVCacheShape(num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype=torch.bfloat16)
BLOCK_BYTES = 2 * 2 * 3 * 8 * 4 * 2  # k and v, layers, heads, head size, tokens, bytes a value
CPU = CpuMemory()


def test_budget_buys_whole_blocks() -> None:
    assert count_blocks(SHAPE, str(11 * BLOCK_BYTES - 1), 4, CPU) == 10


def test_the_cache_has_so_many_blocks() -> None:
    cache = allocate_kv_cache(SHAPE, 10, CPU)
    assert cache.num_blocks == 10
    for tensor in (cache.k_cache_LNSKD, cache.v_cache_LNSKD):
        assert tensor.shape == (2, 10, 4, 3, 8)
        assert tensor.dtype == torch.bfloat16
        assert not tensor.any()
    for layer, own in enumerate(cache.layers):
        own.keys_NSKD.fill_(layer + 1)
        own.values_NSKD.fill_(-layer - 1)
    assert cache.k_cache_LNSKD[:, 3, 1, 2, 7].tolist() == [1, 2]
    assert cache.v_cache_LNSKD[:, 3, 1, 2, 7].tolist() == [-1, -2]


def test_a_cache_that_holds_no_whole_sequence_is_refused() -> None:
    with pytest.raises(KVCacheMemoryError, match=r"holds 8 tokens, but one sequence may need 9"):
        count_blocks(SHAPE, str(2 * BLOCK_BYTES), 9, CPU)


def test_a_cache_larger_than_the_memory_is_refused() -> None:
    with pytest.raises(KVCacheMemoryError, match="lower kv_cache_memory"):
        count_blocks(SHAPE, "1000000GiB", 9, CPU)


def test_a_share_is_of_the_free_memory() -> None:
    assert count_blocks(SHAPE, "0.01%", 4, CPU) * BLOCK_BYTES == pytest.approx(
        psutil.virtual_memory().available * 0.0001, rel=0.2
    )
