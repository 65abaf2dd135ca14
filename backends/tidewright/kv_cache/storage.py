"""The tensors that hold keys and values, sized from a budget in bytes. Which block is whose: block_pool.py."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from tidewright.devices.cpu.huge_pages import huge_empty
from tidewright.kv_cache.budget import AUTO_CPU, AUTO_GPU, blocks_of, bytes_per_block, parse_memory


class KVCacheMemoryError(ValueError):
    """The KV cache budget is too small to be useful, or larger than the memory there is."""


@dataclass(frozen=True)
class KVCacheShape:
    """What one block of this rank's cache holds."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        sizes = self.num_layers, self.num_kv_heads, self.head_dim, self.block_size
        return bytes_per_block(*sizes, self.dtype.itemsize)


@dataclass(frozen=True)
class KVCache:
    k_cache_LNSKD: torch.Tensor
    v_cache_LNSKD: torch.Tensor

    @property
    def num_blocks(self) -> int:
        return self.k_cache_LNSKD.shape[1]


def count_blocks(shape: KVCacheShape, budget: str, needed_tokens: int, device: torch.device) -> int:
    """As many blocks as `budget` pays for: an amount, a share of the free memory, or "auto".

    Raises:
        KVCacheMemoryError: fewer than `needed_tokens` tokens fit, or the memory is not there.
    """
    available = _available_bytes(device)
    if budget == "auto":
        budget = AUTO_CPU if device.type == "cpu" else AUTO_GPU
    budget_bytes = parse_memory(budget, available)
    num_blocks = budget_bytes // shape.bytes_per_block
    needed_bytes = blocks_of(needed_tokens, shape.block_size) * shape.bytes_per_block
    if budget_bytes < needed_bytes:
        raise KVCacheMemoryError(
            f"the KV cache of {_mib(budget_bytes)} holds {num_blocks * shape.block_size} tokens, but one "
            f"sequence may need {needed_tokens}; give it at least {_mib(needed_bytes)}, or lower max_model_len"
        )
    if budget_bytes > available:
        raise KVCacheMemoryError(
            f"the KV cache wants {_mib(budget_bytes)}, but {device} has {_mib(available)} free; lower kv_cache_memory"
        )
    return num_blocks


def allocate_kv_cache(shape: KVCacheShape, num_blocks: int, device: torch.device) -> KVCache:
    dimensions = (shape.num_layers, num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
    make = _zeros_on_demand if device.type == "cpu" else torch.zeros
    # Zeros, not empty: a masked position is multiplied by 0, and 0 * NaN would poison its neighbours.
    return KVCache(
        k_cache_LNSKD=make(dimensions, dtype=shape.dtype, device=device),
        v_cache_LNSKD=make(dimensions, dtype=shape.dtype, device=device),
    )


def _zeros_on_demand(dimensions: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The kernel clears pages when they are first used: to write a gigabyte of zeros takes a second, at each start."""
    return huge_empty(math.prod(dimensions) * dtype.itemsize).view(dtype).view(dimensions)


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
