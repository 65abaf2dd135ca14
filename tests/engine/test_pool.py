"""engine/pool.py: the first engine's count of blocks is kept by those that take its place, if memory allows."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from helpers.counted_memory import CountedMemory
from tidewright.devices import memory as memory_module
from tidewright.engine.messages import EngineConfig
from tidewright.engine.pool import PoolSize, pool_blocks, pool_size
from tidewright.kv_cache import storage
from tidewright.kv_cache.budget import mib
from tidewright.kv_cache.storage import KVCacheMemoryError, KVCacheShape

SHAPE = KVCacheShape(num_layers=2, num_kv_heads=1, head_dim=32, block_size=4, dtype=torch.float32)
SIZE = 2048  # bytes of a block


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.0)


def blocks(free: int, step: int = 0, **changes: Any) -> int:
    """`free` and `step` in blocks; one sequence may need three."""
    config = EngineConfig(model_dir="", **{"kv_cache_memory": "50%", **changes})
    return pool_blocks(config, SHAPE, 12, CountedMemory(free * SIZE), step * SIZE)


def test_later_engines_keep_what_the_first_counted() -> None:
    assert blocks(100) == 50
    assert blocks(100, step=10) == 40  # of the share
    assert blocks(60, num_blocks=50) == 50  # although half of what is free now is less
    assert blocks(60, num_blocks=50, step=10) == 50
    assert blocks(1000, num_blocks=50) == 50


def test_memory_of_an_engine_that_died_may_come_back_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 60.0)
    monkeypatch.setattr(memory_module, "_POLL", 0.001)
    frees = iter([10, 20, 49, 50])
    monkeypatch.setattr(CountedMemory, "free", lambda self: next(frees) * SIZE)
    assert blocks(0, num_blocks=50) == 50


def test_with_less_memory_it_goes_on_with_fewer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blocks(80, kv_cache_memory="80%", num_blocks=70, step=14, replayed_tokens=200) == 50
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "there is memory for 50 blocks of KV cache (0.1 MiB) on each rank, not for the 70 (0.1 MiB) of the engine "
        "before; going on, but refusing requests of more than 200 tokens until a restart finds more"
    )
    assert blocks(40, num_blocks=50) == 20
    assert blocks(40, kv_cache_memory="100KiB", num_blocks=50) == 32
    assert blocks(40, kv_cache_memory="100KiB", num_blocks=50, tensor_parallel_size=4) == 32  # each has its own device
    monkeypatch.setattr(CountedMemory, "is_bounded", False)
    assert blocks(40, kv_cache_memory="100KiB", num_blocks=50, tensor_parallel_size=4) == 8  # they share a machine


def test_not_so_if_a_request_in_flight_needs_more() -> None:
    with pytest.raises(KVCacheMemoryError, match=r"for 20 blocks .* in flight needs 81 tokens where this holds 80"):
        blocks(40, num_blocks=50, replayed_tokens=81)


def test_nor_if_it_is_of_no_use_at_all() -> None:
    assert blocks(6, num_blocks=50) == 3
    with pytest.raises(KVCacheMemoryError, match=r"may need 12 tokens .* 0\.0 MiB free; it had more when the server"):
        blocks(3, num_blocks=50)


def test_an_automatic_size_is_no_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedMemory, "is_bounded", False)
    monkeypatch.setattr(CountedMemory, "kv_budget", str(50 * SIZE))
    assert [blocks(free, kv_cache_memory="auto") for free in (100, 60, 20)] == [50, 48, 16]
    assert blocks(60, kv_cache_memory="auto", tensor_parallel_size=2) == 24  # they share a machine
    assert size("90%", 20, 10, kv_cache_memory="auto", free=100).num_blocks == 80
    with pytest.raises(KVCacheMemoryError, match="lower kv_cache_memory"):
        blocks(20, kv_cache_memory=str(50 * SIZE))


def size(budget: str, weights: int, workspace: int, free: int = 200, **changes: Any) -> PoolSize:
    """On a device of 200 blocks; all in blocks."""
    config, memory = EngineConfig(model_dir="", **{"memory_budget": budget, **changes}), CountedMemory(200 * SIZE)
    memory.free = lambda: free * SIZE  # type: ignore[method-assign]
    made = pool_size(config, SHAPE, 12, memory, weights * SIZE, workspace * SIZE, workspace * SIZE)
    assert made.num_blocks <= made.most_blocks <= made.room_blocks
    assert (weights + workspace + made.most_blocks) * SIZE <= made.budget
    return PoolSize(made.num_blocks, made.most_blocks, made.budget // SIZE, made.room_blocks)


def test_the_cache_has_what_the_budget_leaves() -> None:
    assert size("50%", 20, 10) == PoolSize(70, 70, 100, 70)
    assert size(str(60 * SIZE), 20, 10) == PoolSize(30, 30, 60, 30)
    assert size("50%", 20, 10, kv_cache_memory=str(40 * SIZE)) == PoolSize(40, 70, 100, 70)
    assert size("50%", 20, 10, kv_cache_memory=str(90 * SIZE)) == PoolSize(70, 70, 100, 70)
    assert size("50%", 20, 10, num_blocks=55) == PoolSize(55, 70, 100, 70)  # as it was set


def test_without_a_budget_it_is_what_all_take_together() -> None:
    assert size("auto", 20, 10, kv_cache_memory=str(40 * SIZE)) == PoolSize(40, 40, 70, 40)
    later = size("auto", 20, 10, kv_cache_memory=str(40 * SIZE), num_blocks=15, most_blocks=40)
    assert later == PoolSize(15, 40, 70, 40)


def test_of_several_models_each_begins_with_its_share_or_with_what_the_others_left_and_has_room_for_all() -> None:
    half = {"kv_cache_memory": str(40 * SIZE), "memory_share": 0.5}
    assert size("auto", 20, 10, **half) == PoolSize(40, 40, 70, 80)
    assert size("auto", 20, 10, **half, kv_limit=7 * SIZE) == PoolSize(7, 7, 37, 80)
    assert size("auto", 20, 10, **half, kv_limit=60 * SIZE) == PoolSize(60, 60, 90, 80)
    # An engine that takes another's place has what that one had.
    later = size("auto", 20, 10, **half, kv_limit=7 * SIZE, num_blocks=15, most_blocks=25)
    assert later == PoolSize(15, 25, 55, 80)
    half = {"memory_share": 0.5}
    assert size(str(60 * SIZE), 20, 10, **half) == PoolSize(30, 30, 60, 90)
    assert size(str(60 * SIZE), 20, 10, **half, kv_limit=7 * SIZE) == PoolSize(7, 7, 37, 90)
    assert size(str(60 * SIZE), 20, 10, **half, num_blocks=20, most_blocks=50) == PoolSize(20, 50, 80, 90)


def test_a_budget_that_pays_for_no_request_is_refused() -> None:
    with pytest.raises(KVCacheMemoryError, match=r"memory_budget is .* one sequence may need .*: raise memory"):
        size(str(32 * SIZE), 20, 10)
    with pytest.raises(KVCacheMemoryError) as caught:
        size(str(32 * SIZE), 20, 10, memory_share=0.25)
    whole, part = mib(128 * SIZE), mib(32 * SIZE)
    assert f"is {whole} for all models, and the part of this one (kv_cache_share 0.25) {part}" in str(caught.value)
    assert "raise memory_budget or the kv_cache_share of this model, or lower max_model_len" in str(caught.value)
