"""What crosses between host and device beside the step's buffers: all of one way in one transfer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from tidewright.step.arena import torch_dtype

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pending(Generic[T]):
    """A value that the host makes of what the device computes: `read` gets `parts` once they have come to the host."""

    parts: Sequence[torch.Tensor]
    read: Callable[[Sequence[torch.Tensor]], T]

    def now(self) -> T:
        """Waits for the device."""
        return self.read([part.cpu() for part in self.parts])


class Download:
    """Sends the parts of some pending values to the host at once. Making one does not wait for the device."""

    def __init__(self, pending: Sequence[Pending[Any]], staged: bool | None = None) -> None:
        """`staged`: host and device have memory of their own; by default, if a part is not on the CPU."""
        self._pending = pending
        self._parts = [part for one in pending for part in one.parts]
        self._sent: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        if staged is None:
            staged = any(part.device.type != "cpu" for part in self._parts)
        if staged and self._parts:
            ordered = [self._parts[index] for index in _widest_first([part.dtype.itemsize for part in self._parts])]
            together = torch.cat([part.reshape(-1).view(torch.uint8) for part in ordered])
            self._sent = together.to("cpu", non_blocking=True)  # to pinned memory
            if together.is_cuda:
                self._arrived = torch.cuda.Event()
                self._arrived.record(torch.cuda.current_stream(together.device))

    def wait(self) -> list[Any]:
        """The values, in order."""
        if self._arrived is not None:
            self._arrived.synchronize()
        rest = iter(self._parts if self._sent is None else self._cut(self._sent))
        return [one.read([next(rest) for _ in one.parts]) for one in self._pending]

    def _cut(self, sent: torch.Tensor) -> list[torch.Tensor]:
        parts, begin = [*self._parts], 0
        for index in _widest_first([part.dtype.itemsize for part in parts]):
            part = parts[index]
            end = begin + part.numel() * part.dtype.itemsize
            parts[index] = sent[begin:end].view(part.dtype).view(part.shape)
            begin = end
        return parts


def upload(
    arrays: Mapping[str, np.ndarray], device: torch.device, staged: bool | None = None
) -> dict[str, torch.Tensor]:
    """The one-dimensional arrays on the device. The host does not wait: they leave from pinned memory of their own."""
    if not arrays or not (device.type != "cpu" if staged is None else staged):
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    names, total = [*arrays], sum(array.nbytes for array in arrays.values())
    names = [names[index] for index in _widest_first([arrays[name].itemsize for name in names])]
    host = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.concatenate([arrays[name].view(np.uint8) for name in names], out=host.numpy())
    on_device, sent, begin = host.to(device, non_blocking=True), {}, 0
    for name in names:
        end = begin + arrays[name].nbytes
        sent[name] = on_device[begin:end].view(torch_dtype(arrays[name].dtype))
        begin = end
    return sent


def _widest_first(itemsizes: Sequence[int]) -> list[int]:
    """In this order each is aligned if the first is."""
    return sorted(range(len(itemsizes)), key=lambda index: -itemsizes[index])
