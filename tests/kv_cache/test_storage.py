"""kv_cache/storage.py: the number of blocks follows from the budget; budgets that can't work are refused."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from torch.overrides import TorchFunctionMode

from helpers.counted_memory import CountedMemory
from tidewright.devices.cpu import memory as cpu_memory
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.devices.memory import out_of_memory
from tidewright.kv_cache import storage
from tidewright.kv_cache.storage import BlockMoveError, KVCache, KVCacheMemoryError, KVCacheShape, count_blocks
from tidewright.memory.machine import MachineMemory

SHAPE = KVCacheShape(num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype=torch.bfloat16)
BLOCK_BYTES = 2 * 2 * 3 * 8 * 4 * 2  # k and v, layers, heads, head size, tokens, bytes a value
CPU = CpuMemory()


def test_budget_buys_whole_blocks() -> None:
    assert count_blocks(SHAPE, str(11 * BLOCK_BYTES - 1), 4, CPU) == 10


def test_the_cache_has_so_many_blocks() -> None:
    cache = KVCache(SHAPE, 10, CPU)
    assert cache.num_blocks == 10
    assert cache.nbytes == 10 * BLOCK_BYTES
    for layer, own in enumerate(cache.layers):
        for tensor in own.tensors:
            assert tensor.shape == (10, 4, 3, 8)
            assert tensor.dtype == torch.bfloat16
            assert not tensor.any()
        own.keys_NSKD.fill_(layer + 1)
        own.values_NSKD.fill_(-layer - 1)
    assert [own.keys_NSKD[3, 1, 2, 7].item() for own in cache.layers] == [1, 2]
    assert [own.values_NSKD[3, 1, 2, 7].item() for own in cache.layers] == [-1, -2]


class Copied(CpuMemory):
    """As a GPU's: nothing is reserved, so layers are copied."""

    reserves = False


@pytest.mark.parametrize("memory", [CPU, Copied()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_cache_that_shrinks_and_grows_keeps_what_its_blocks_hold(memory: CpuMemory, dtype: torch.dtype) -> None:
    cache = KVCache(replace(SHAPE, dtype=dtype), 10, memory, most_blocks=12)
    for layer, own in enumerate(cache.layers):
        for kind, tensor in enumerate(own.tensors):
            numbers = 2 * layer + kind + torch.arange(len(tensor))  # which even fp8 has
            tensor.copy_(numbers.view(-1, *[1] * (tensor.dim() - 1)))
    before = [[tensor.float().clone() for tensor in own.tensors] for own in cache.layers]
    cache.move({9: 2, 7: 0})
    assert cache.resize(6) == (not memory.reserves)
    assert cache.resize(12) == (not memory.reserves)
    assert cache.num_blocks == 12
    for own, was in zip(cache.layers, before, strict=True):
        for tensor, old in zip(own.tensors, was, strict=True):
            assert tensor.shape == (12, *old.shape[1:])
            assert tensor.dtype in (dtype, torch.float32)
            assert torch.equal(tensor[:6].float(), old[[7, 1, 9, 3, 4, 5]])


class Indexed(TorchFunctionMode):
    """Sees the copies of what is read by index; the one after the first `room` finds no memory."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._room = room

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
            if len(self.sizes) == self._room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.sizes.append(made.nbytes)
        return made


def test_blocks_move_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(SHAPE, 40, CPU)
    one = cache.layers[0].keys_NSKD[0].nbytes
    monkeypatch.setattr(storage, "MOVED_BYTES", 3 * one + 1)
    for own in cache.layers:
        for tensor in own.tensors:
            tensor.copy_(torch.arange(40).view(-1, 1, 1, 1))
    moves = {20 + number: 3 + number for number in range(10)}
    with Indexed() as seen:
        cache.move(moves)
    assert max(seen.sizes) == 3 * one
    for own in cache.layers:
        for tensor in own.tensors:
            assert tensor[:, 0, 0, 0].tolist() == [*range(3), *range(20, 30), *range(13, 40)]


def test_a_lack_of_memory_amid_moves_is_an_error_of_its_own() -> None:
    """Not one that is survived, as that of a step or of a copy is."""
    cache = KVCache(SHAPE, 10, CPU)
    with Indexed(room=3), pytest.raises(BlockMoveError, match=r"no memory to move 1 blocks .* out of memory") as raised:
        cache.move({9: 2})
    assert not out_of_memory(raised.value)


@pytest.mark.parametrize(("num_blocks", "left"), [(6, 6), (14, 10)])
def test_a_copy_without_memory_costs_no_block(num_blocks: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks one alone may lack it, and the others have resized theirs."""
    memory = CountedMemory(1 << 30)
    cache = KVCache(SHAPE, 10, memory)
    for own in cache.layers:
        for tensor in own.tensors:
            tensor[:] = torch.arange(10)[:, None, None, None]
    given = iter([torch.zeros] * 2)

    def zeros(dimensions: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if (make := next(given, None)) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(dimensions, dtype=dtype)

    monkeypatch.setattr(memory, "zeros", zeros)
    with contextlib.nullcontext() if num_blocks < 10 else pytest.raises(torch.OutOfMemoryError):
        assert cache.resize(num_blocks)
    assert cache.num_blocks == left
    assert len({len(own.keys_NSKD) for own in cache.layers}) == 2  # the first layer is elsewhere
    assert all(tensor[:left, 0, 0, 0].tolist() == [*range(left)] for own in cache.layers for tensor in own.tensors)


def test_what_can_not_grow_gives_back_what_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or memory that nobody uses would be lacking, so that it is never tried again."""
    memory = CountedMemory(1 << 30)
    cache = KVCache(SHAPE, 10, memory)
    for own in cache.layers:
        for tensor in own.tensors:
            tensor[:] = torch.arange(10)[:, None, None, None]
    made: list[int] = []

    def zeros(dimensions: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if made.count(14) == 3 and dimensions[0] == 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(dimensions[0])
        return torch.zeros(dimensions, dtype=dtype)

    monkeypatch.setattr(memory, "zeros", zeros)
    with pytest.raises(torch.OutOfMemoryError):
        cache.resize(14)
    assert made == [14, 14, 14, 10, 10]  # two of the first layer, one of the second
    assert (cache.num_blocks, cache.room) == (10, 10)
    assert all(tensor[:, 0, 0, 0].tolist() == [*range(10)] for own in cache.layers for tensor in own.tensors)


def test_blocks_that_go_give_their_memory_back() -> None:
    shape = KVCacheShape(num_layers=2, num_kv_heads=1, head_dim=64, block_size=16, dtype=torch.float32)
    cache = KVCache(shape, 1000, CpuMemory(), most_blocks=1 << 20)  # 16 GiB, of which nothing is used

    def resident() -> int:
        return psutil.Process().memory_info().rss

    before = resident()
    for own in cache.layers:
        for tensor in own.tensors:
            tensor[:1000] = 1.0
    used = resident() - before
    assert used >= 1000 * shape.bytes_per_block
    cache.resize(200)
    assert resident() - before < 0.5 * used
    assert all(tensor[:200].eq(1).all() for own in cache.layers for tensor in own.tensors)
    assert not any(tensor[201:1000].any() for own in cache.layers for tensor in own.tensors)


def test_a_cache_that_holds_no_whole_sequence_is_refused() -> None:
    with pytest.raises(KVCacheMemoryError, match=r"holds 8 tokens, but one sequence may need 9"):
        count_blocks(SHAPE, str(2 * BLOCK_BYTES), 9, CPU)


def test_a_cache_larger_than_the_memory_is_refused() -> None:
    with pytest.raises(KVCacheMemoryError, match="lower kv_cache_memory"):
        count_blocks(SHAPE, "1000000GiB", 9, CPU)


def test_a_share_is_of_the_free_memory_of_machine_or_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "machine_memory", lambda: MachineMemory(total=1000 * BLOCK_BYTES, free=90_000))
    assert count_blocks(SHAPE, "50%", 4, CPU) == 45_000 // BLOCK_BYTES
    with pytest.raises(KVCacheMemoryError, match="lower kv_cache_memory"):
        count_blocks(SHAPE, "100KiB", 4, CPU)
