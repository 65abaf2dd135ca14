"""A device's memory as a bounded one, on the CPU: counts the bytes of tensors as they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tidewright.devices.memory import DeviceMemory


class Counter(TorchDispatchMode):
    """Live bytes of all storages that operations make while it is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(torch.Tensor, lambda tensor: self._note(tensor, 0), (args, kwargs))  # those that were there
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda tensor: self._note(tensor, tensor.untyped_storage().nbytes()), result)
        return result

    def _note(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address and address not in self._known:
            self._known[address] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.live -= self._known.pop(address, 0)


class CountedMemory(DeviceMemory):
    """`total` bytes; what was allocated before it was made does not count."""

    def __init__(self, total: int) -> None:
        super().__init__(torch.device("cpu"))
        self.total = total
        self.peaks: list[int] = []  # measured
        self.trims = 0

    def free(self) -> int:
        return self.total

    def capacity(self) -> int:
        return self.total

    def trim(self) -> None:
        self.trims += 1

    def measure_peak(self, run: Callable[[], object]) -> int:
        with self.counting() as counter:
            run()
        self.peaks.append(counter.peak)
        return counter.peak

    @contextmanager
    def counting(self) -> Iterator[Counter]:
        with Counter() as counter:
            yield counter

    def zeros(self, dimensions: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(dimensions, dtype=dtype)
