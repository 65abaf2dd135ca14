"""What a step's results cross to the host in: all of them in one transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

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
            # Wide types first, so that each part is aligned.
            ordered = sorted(self._parts, key=lambda part: -part.dtype.itemsize)
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
        parts: list[torch.Tensor] = list(self._parts)
        begin = 0
        for index in sorted(range(len(parts)), key=lambda index: -parts[index].dtype.itemsize):
            part = parts[index]
            end = begin + part.numel() * part.dtype.itemsize
            parts[index] = sent[begin:end].view(part.dtype).view(part.shape)
            begin = end
        return parts
