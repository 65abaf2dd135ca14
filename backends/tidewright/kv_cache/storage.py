"""The tensors that hold keys and values, sized from a budget in bytes. Which block is whose: block_pool.py."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tidewright.devices.memory import PATIENCE, DeviceMemory, out_of_memory
from tidewright.kv_cache.budget import SCALE_BYTES, blocks_of, bytes_per_block, is_share, mib, parse_memory
from tidewright.kv_cache.quantized import is_quantized


class KVCacheMemoryError(ValueError):
    """The KV cache budget is too small to be useful, or larger than the memory there is."""


class BlockMoveError(Exception):
    """Memory ran out as blocks were moved: nobody knows any more what which of them holds."""


MOVED_BYTES = 4 << 20  # at once: what is moved is twice in memory meanwhile


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
    def tensors(self) -> tuple[torch.Tensor, ...]:
        found = (self.keys_NSKD, self.values_NSKD, self.key_scales_NKS, self.value_scales_NKS)
        return tuple(tensor for tensor in found if tensor is not None)

    @property
    def num_kv_heads(self) -> int:
        return self.keys_NSKD.shape[2]


class KVCache:
    """All layers' blocks, of which the first `num_blocks` are in use."""

    def __init__(self, shape: KVCacheShape, num_blocks: int, memory: DeviceMemory, most_blocks: int = 0) -> None:
        """`most_blocks`: that there may ever be. Where memory can be reserved, layers have room for them at once.

        Zeros, not empty: a masked position is multiplied by 0, and 0 * NaN would poison its neighbours.
        """
        self.num_blocks, self._memory = num_blocks, memory
        self.room = max(num_blocks, most_blocks if memory.reserves else 0)
        """Blocks of a layer, used or not; from one layer to the next it is so far, where memory is reserved."""
        of_values = shape.block_size, shape.num_kv_heads, shape.head_dim
        kinds = [self._layers_of(shape.num_layers, of_values, shape.dtype) for _ in range(2)]
        if is_quantized(shape.dtype):
            of_scales = shape.num_kv_heads, shape.block_size
            kinds += [self._layers_of(shape.num_layers, of_scales, torch.float32) for _ in range(2)]
        self.layers = [LayerCache(*parts) for parts in zip(*kinds, strict=True)]

    def _layers_of(self, num_layers: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Iterable[torch.Tensor]:
        """Side by side if they are to stay where they are, else each by itself, so that one can be replaced."""
        if self._memory.reserves:
            return self._memory.zeros((num_layers, self.room, *sizes), dtype)
        return [self._memory.zeros((self.room, *sizes), dtype) for _ in range(num_layers)]

    @property
    def nbytes(self) -> int:
        """Of the blocks in use."""
        return sum(tensor[: self.num_blocks].nbytes for layer in self.layers for tensor in layer.tensors)

    def move(self, moves: Mapping[int, int]) -> None:
        """Moves the content of blocks as BlockPool.resize says: none of them moves to where another comes from.

        Raises:
            BlockMoveError: memory did not suffice. They have their new numbers already, so there is no going on.
        """
        try:
            for layer in self.layers if moves else ():
                for tensor in layer.tensors:
                    _move(tensor, [*moves.keys()], [*moves.values()])
        except Exception as error:
            if not (lack := out_of_memory(error)):
                raise
            raise BlockMoveError(f"no memory to move {len(moves)} blocks of the KV cache: {lack}") from None

    def resize(self, num_blocks: int) -> bool:
        """Gives back what is behind the first `num_blocks`, or gets what is missing.

        Where memory is reserved, layers stay where they are. Otherwise one after the other is copied, so that there
        must be memory for one more; True: they are elsewhere now. If it runs out in between, a cache that shrinks keeps
        some layers larger than needed, and one that grows raises the error and has as many blocks as before, for which
        it gives back what some layers got already.
        """
        before, self.num_blocks = self.num_blocks, num_blocks
        if self._memory.reserves:
            assert num_blocks <= self.room, "no more than were reserved"
            for layer in self.layers:
                for tensor in layer.tensors:
                    self._memory.release(tensor[num_blocks:before])
            return False
        self.num_blocks = min(before, num_blocks)
        try:
            self._copy(num_blocks)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if num_blocks > before:
                self._give_back(before)
                raise
        self.num_blocks = self.room = num_blocks
        self._memory.trim()
        return True

    def _copy(self, num_blocks: int) -> None:
        """Layers of another size, to memory for so many blocks."""
        for index, layer in enumerate(self.layers):
            if len(layer.keys_NSKD) != num_blocks:
                self.layers[index] = LayerCache(*(self._copied(tensor, num_blocks) for tensor in layer.tensors))

    def _give_back(self, num_blocks: int) -> None:
        """What layers have beyond so many blocks, if there is memory for a copy: less than what has just failed."""
        try:
            self._copy(num_blocks)
        except Exception as error:
            if not out_of_memory(error):
                raise

    def _copied(self, tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
        made = self._memory.zeros((num_blocks, *tensor.shape[1:]), tensor.dtype)
        kept = min(num_blocks, len(tensor))
        made[:kept].copy_(tensor[:kept])
        return made


def _move(tensor_NX: torch.Tensor, sources: list[int], places: list[int]) -> None:
    """In parts, for each is copied to memory of its own first."""
    bytes_NX = tensor_NX.view(torch.uint8)  # for not every type of numbers can be copied by index
    count = max(MOVED_BYTES // bytes_NX[0].nbytes, 1)
    for first in range(0, len(sources), count):
        part = slice(first, first + count)
        source, place = (torch.tensor(of[part], device=tensor_NX.device) for of in (sources, places))
        bytes_NX[place] = bytes_NX[source]


def count_blocks(
    shape: KVCacheShape, budget: str, needed_tokens: int, memory: DeviceMemory, step_bytes: int = 0
) -> int:
    """As many blocks as `budget` pays for: an amount, or a share of the free memory.

    `step_bytes`: what the largest step takes; of a share it comes off.

    Raises:
        KVCacheMemoryError: fewer than `needed_tokens` tokens fit, or the memory is not there.
    """
    available = memory.free()
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
