"""How many blocks an engine's KV cache has: counted by the first, kept by those that take its place.

A request was accepted for the pool that there was then. With a smaller one its replay might be refused.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from tidewright.devices.memory import DeviceMemory
from tidewright.distributed.group import ALONE, TensorParallelGroup
from tidewright.engine.messages import EngineConfig
from tidewright.kv_cache.budget import blocks_of, is_share, mib, parse_memory
from tidewright.kv_cache.storage import KVCacheMemoryError, KVCacheShape, as_many_blocks, count_blocks
from tidewright.logs import event

_SHARE = 80  # percent of the free memory, if an engine finds less than an amount that was configured, or is automatic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolSize:
    num_blocks: int
    most_blocks: int  # that `memory_budget` pays for
    budget: int  # bytes of this rank, for everything
    room_blocks: int  # that the budgets of all models together could pay for


def pool_size(
    config: EngineConfig,
    shape: KVCacheShape,
    needed_tokens: int,
    memory: DeviceMemory,
    weights: int,
    workspace: int,
    step_bytes: int = 0,
    group: TensorParallelGroup = ALONE,
) -> PoolSize:
    """`workspace`: what steps take, as the budget counts it; `step_bytes`: measured, where memory is bounded.

    Raises:
        KVCacheMemoryError: as `pool_blocks`, or the budget does not pay for `needed_tokens` beside the rest.
    """
    block, limit = shape.bytes_per_block, config.kv_limit // shape.bytes_per_block
    if config.memory_budget == "auto":
        whole = _whole_cache(config, memory)
        if limit:
            config = msgspec.structs.replace(config, kv_cache_memory=str(limit * block))
        num_blocks = pool_blocks(config, shape, needed_tokens, memory, step_bytes, group)
        most = config.most_blocks or max(num_blocks, config.num_blocks)
        room = max(most, group.smallest(whole // block))
        return PoolSize(num_blocks, most, weights + workspace + _adapters(config, memory) + most * block, room)
    budget = parse_memory(config.memory_budget, memory.capacity())
    if not memory.is_bounded:
        budget //= config.local_ranks  # which share it
    room = max(int(budget / config.memory_share) - weights - workspace, 0) // block
    most = max(budget - weights - workspace, 0) // block
    if most < (needed := blocks_of(needed_tokens, shape.block_size)):
        raise KVCacheMemoryError(
            f"{_part_of_budget(budget, config)}, of which weights take {mib(weights)} and a step up to "
            f"{mib(workspace)}; one sequence may need {mib(needed * block)} of KV cache: raise memory_budget"
            f"{' or the kv_cache_share of this model' if config.memory_share < 1 else ''}, or lower max_model_len, "
            "max_batched_tokens or max_running"
        )
    if allowed := config.most_blocks or limit:
        most, budget = allowed, budget + (allowed - most) * block
    if config.kv_cache_memory == "auto":
        config = msgspec.structs.replace(config, kv_cache_memory=_automatic(most * block, config, memory))
    num_blocks = pool_blocks(config, shape, needed_tokens, memory, step_bytes, group)
    most = group.smallest(most)
    return PoolSize(min(num_blocks, most), most, budget, max(most, group.smallest(room)))


def _part_of_budget(budget: int, config: EngineConfig) -> str:
    """As the operator gave it, and what of it this model has; `budget` is in bytes of a rank."""
    each = " on each rank" if config.local_ranks > 1 else ""
    if config.memory_share == 1:
        return f"memory_budget is {mib(budget)}{each}"
    whole, part = mib(int(budget / config.memory_share)), f"kv_cache_share {config.memory_share:g}"
    return f"memory_budget is {whole}{each} for all models, and the part of this one ({part}) {mib(budget)}"


def _automatic(size: int, config: EngineConfig, memory: DeviceMemory) -> str:
    """Of the bytes of a KV cache that nobody asked for, what there is memory for. A GPU's have been measured."""
    if not memory.is_bounded:
        size = min(size, parse_memory(f"{_SHARE / config.local_ranks}%", memory.free()))
    return str(size)


def _whole_cache(config: EngineConfig, memory: DeviceMemory) -> int:
    """Bytes of `kv_cache_memory`, of which this model has a share; 0 if it has all of it."""
    if config.memory_share == 1:
        return 0
    text = memory.kv_budget if config.kv_cache_memory == "auto" else config.kv_cache_memory
    return int(parse_memory(text, memory.free()) / config.memory_share)


def _adapters(config: EngineConfig, memory: DeviceMemory) -> int:
    """Bytes that LoRA adapters may take beside the KV cache, on this rank."""
    if memory.is_bounded or not config.adapter_folder:
        return 0
    return parse_memory(config.adapter_memory, 0) // config.tensor_parallel_size


def pool_blocks(
    config: EngineConfig,
    shape: KVCacheShape,
    needed_tokens: int,
    memory: DeviceMemory,
    step_bytes: int = 0,
    group: TensorParallelGroup = ALONE,
) -> int:
    """The block tables are the same on all ranks, so the pool is as large as the smallest rank's.

    Raises:
        KVCacheMemoryError: there is no memory for one that is of use; for a later engine, for its requests in flight.
    """
    kept, budget = config.num_blocks, config.kv_cache_memory
    if budget == "auto":
        budget = memory.kv_budget
        if not is_share(budget):
            budget = _automatic(parse_memory(budget, 0), config, memory)
    if not kept:
        return group.smallest(count_blocks(shape, budget, needed_tokens, memory, step_bytes))
    if not is_share(budget):
        budget = f"{_SHARE if memory.is_bounded else _SHARE / config.local_ranks}%"
    num_blocks = group.smallest(as_many_blocks(shape, kept, budget, needed_tokens, memory, step_bytes))
    if num_blocks == kept:
        return kept
    size, tokens = shape.bytes_per_block, num_blocks * shape.block_size
    found = (
        f"there is memory for {num_blocks} blocks of KV cache ({mib(num_blocks * size)}) on each rank, not for the "
        f"{kept} ({mib(kept * size)}) of the engine before"
    )
    if tokens < config.replayed_tokens:
        raise KVCacheMemoryError(
            f"{found}, and a request in flight needs {config.replayed_tokens} tokens where this holds {tokens}: "
            "see what else takes the memory"
        )
    if group.rank == 0:
        what = "%s; going on, but refusing requests of more than %d tokens until a restart finds more"
        log.warning(what, found, tokens, extra=event("kv_cache_shrunk"))
    return num_blocks
