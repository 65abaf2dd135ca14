"""The tensors that hold keys and values, sized from a budget in bytes. Which block is whose: block_pool.py."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tidewright.devices.memory import PATIENCE, DeviceMemory
from tidewright.kv_cache.budget import SCALE_BYTES, blocks_of, bytes_per_block, is_share, mib, parse_memory
from tidewright.kv_cache.quantized import is_quantized


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
        return bytes_per_block(*sizes, self.dtype.itemsize, SCALE_BYTES if is_quantized(self.dtype) else 0)


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's keys and values by block, in a type of their own: N blocks of S tokens with K heads of D values.

    Where the type is one of kv_cache/quantized.py, float32 scales; those of a head's S tokens lie side by side.
    """

    keys_NSKD: torch.Tensor
    values_NSKD: torch.Tensor
    key_scales_NKS: torch.Tensor | None = None
    value_scales_NKS: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.keys_NSKD.dtype

    @property
    def num_kv_heads(self) -> int:
        return self.keys_NSKD.shape[2]


@dataclass(frozen=True, eq=False)
class KVCache:
    """All layers' keys, and all their values, lie side by side; so do their scales, if there are any."""

    k_cache_LNSKD: torch.Tensor
    v_cache_LNSKD: torch.Tensor
    k_scales_LNKS: torch.Tensor | None = None
    v_scales_LNKS: torch.Tensor | None = None
    layers: tuple[LayerCache, ...] = field(init=False)

    def __post_init__(self) -> None:
        none = (None,) * len(self.k_cache_LNSKD)
        scales = (none if x is None else x for x in (self.k_scales_LNKS, self.v_scales_LNKS))
        layers = zip(self.k_cache_LNSKD, self.v_cache_LNSKD, *scales, strict=True)
        object.__setattr__(self, "layers", tuple(LayerCache(*parts) for parts in layers))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        found = (self.k_cache_LNSKD, self.v_cache_LNSKD, self.k_scales_LNKS, self.v_scales_LNKS)
        return tuple(tensor for tensor in found if tensor is not None)

    @property
    def num_blocks(self) -> int:
        return self.k_cache_LNSKD.shape[1]


def count_blocks(
    shape: KVCacheShape, budget: str, needed_tokens: int, memory: DeviceMemory, step_bytes: int = 0
) -> int:
    """As many blocks as `budget` pays for: an amount, a share of the free memory, or "auto".

    `step_bytes`: what the largest step takes; of a share it comes off.

    Raises:
        KVCacheMemoryError: fewer than `needed_tokens` tokens fit, or the memory is not there.
    """
    available = memory.free()
    budget = memory.kv_budget if budget == "auto" else budget
    budget_bytes = parse_memory(budget, available) - (step_bytes if is_share(budget) else 0)
    budget_bytes, beside = max(budget_bytes, 0), _beside(step_bytes)
    num_blocks = budget_bytes // shape.bytes_per_block
    needed_bytes = blocks_of(needed_tokens, shape.block_size) * shape.bytes_per_block
    if budget_bytes < needed_bytes:
        raise KVCacheMemoryError(
            f"the KV cache of {mib(budget_bytes)} holds {num_blocks * shape.block_size} tokens, but one "
            f"sequence may need {needed_tokens}; give it at least {mib(needed_bytes)}, or lower max_model_len "
            f"({memory} has {mib(available)} free{beside})"
        )
    if budget_bytes + step_bytes > available:
        raise KVCacheMemoryError(
            f"the KV cache wants {mib(budget_bytes)}, but {memory} has {mib(available)} free{beside}; "
            "lower kv_cache_memory"
        )
    return num_blocks


def as_many_blocks(
    shape: KVCacheShape, num_blocks: int, share: str, needed_tokens: int, memory: DeviceMemory, step_bytes: int = 0
) -> int:
    """`num_blocks`, which an engine before this one had, or what `share` of the free memory pays for after a while.

    Raises:
        KVCacheMemoryError: there is not even memory for `needed_tokens` tokens.
    """
    if memory.await_free(num_blocks * shape.bytes_per_block + step_bytes, PATIENCE):
        return num_blocks
    left = parse_memory(share, memory.free()) - step_bytes
    num_blocks = min(num_blocks, max(left, 0) // shape.bytes_per_block)
    if num_blocks < (needed := blocks_of(needed_tokens, shape.block_size)):
        raise KVCacheMemoryError(
            f"one sequence may need {needed_tokens} tokens of KV cache ({mib(needed * shape.bytes_per_block)}), "
            f"but {memory} has {mib(memory.free())} free{_beside(step_bytes)}; it had more when the server started: "
            "see what else takes it"
        )
    return num_blocks


def _beside(step_bytes: int) -> str:
    return f", of which a step takes up to {mib(step_bytes)} (max_batched_tokens, max_running)" if step_bytes else ""


def allocate_kv_cache(shape: KVCacheShape, num_blocks: int, memory: DeviceMemory) -> KVCache:
    dimensions = (shape.num_layers, num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
    # Zeros, not empty: a masked position is multiplied by 0, and 0 * NaN would poison its neighbours.
    caches = [memory.zeros(dimensions, shape.dtype) for _ in range(2)]
    of_scales = (shape.num_layers, num_blocks, shape.num_kv_heads, shape.block_size)
    scales = [memory.zeros(of_scales, torch.float32) for _ in range(2)] if is_quantized(shape.dtype) else []
    return KVCache(*caches, *scales)
