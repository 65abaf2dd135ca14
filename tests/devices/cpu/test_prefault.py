"""devices/cpu/prefault.py: the next blocks' pages are in memory before their use, and nothing is written to them."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time

import pytest
import torch

from tidewright.devices.cpu import prefault
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.devices.cpu.prefault import Prefaulter
from tidewright.kv_cache.storage import KVCache, KVCacheShape

LAYERS, BLOCKS = 3, 8192
SHAPE = KVCacheShape(num_layers=LAYERS, num_kv_heads=1, head_dim=64, block_size=16, dtype=torch.float32)  # 4 KiB


def cache() -> KVCache:
    return KVCache(SHAPE, BLOCKS, CpuMemory())


def tensors(kv: KVCache) -> list[torch.Tensor]:
    return [tensor for layer in kv.layers for tensor in layer.tensors]


def resident(memory: torch.Tensor) -> float:
    """The share of its pages that are in memory."""
    pages = memory.nbytes // mmap.PAGESIZE
    states = (ctypes.c_ubyte * pages)()
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), states) == 0
    return sum(state & 1 for state in states) / pages


@pytest.fixture(scope="module", autouse=True)
def _kernel_can() -> None:
    made = Prefaulter(kv := cache())
    with made.step(0):
        pass
    made.wait()
    if not resident(kv.layers[0].keys_NSKD[:512]):
        pytest.skip("this kernel does not know MADV_POPULATE_WRITE (Linux 5.14)")


def step(made: Prefaulter, block: int) -> None:
    with made.step(block):
        pass


def test_blocks_ahead_of_the_highest_are_in_memory_in_all_layers() -> None:
    kv = cache()
    made = Prefaulter(kv, ahead=1000 * SHAPE.bytes_per_block)
    step(made, 2000)
    made.wait()
    for memory in tensors(kv):
        assert resident(memory[:3000]) == 1
        # A huge page may reach a little further, and one of the next layer lie partly in this one.
        assert resident(memory[4096:-512]) == 0
    step(made, 5000)
    made.wait()
    assert resident(kv.layers[-1].values_NSKD[:6000]) == 1


def test_what_is_written_meanwhile_stays() -> None:
    kv = cache()
    made = Prefaulter(kv, ahead=BLOCKS * SHAPE.bytes_per_block)
    step(made, 0)
    for memory in tensors(kv):
        memory[::7] = 3.0
    made.wait()
    for memory in tensors(kv):
        assert (memory[::7] == 3.0).all()
        assert not memory[1::7].any()


class Clock:
    """Told what time it is; who sleeps has asked before."""

    def __init__(self) -> None:
        self.now, self._asked = 0.0, threading.Condition()
        self._times = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._asked:
            self._times += 1
            self._asked.notify_all()
        time.sleep(0.001)

    def wait_until_asked(self) -> None:
        """By somebody who begins to ask only now."""
        with self._asked:
            end = self._times + 2
            assert self._asked.wait_for(lambda: self._times >= end, timeout=60)


def test_it_stands_back_while_a_step_runs_and_shortly_after(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(prefault, "time", clock)
    kv = cache()
    made = Prefaulter(kv, ahead=BLOCKS * SHAPE.bytes_per_block)
    step(made, 0)
    clock.wait_until_asked()  # the step before was just now
    with made.step(0):
        clock.wait_until_asked()
        clock.now = 10.0
        clock.wait_until_asked()
    clock.wait_until_asked()
    assert sum(map(resident, tensors(kv))) == 0
    clock.now = 20.0
    made.wait()
    assert all(resident(memory) == 1 for memory in tensors(kv))


def test_it_begins_again_only_when_there_is_enough_to_do() -> None:
    made = Prefaulter(cache(), ahead=1000 * SHAPE.bytes_per_block)
    ends = []
    for block in (0, 10, 100, 300, 8000, 8100, BLOCKS - 1):
        step(made, block)
        made.wait()
        ends.append(made._end)
    assert ends == [1002, 1002, 1002, 1302, BLOCKS, BLOCKS, BLOCKS]
