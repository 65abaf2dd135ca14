"""Where there is a GPU, the tests of its kernels launch them there, compiled, though all tensors are on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def moved(arguments: Sequence[Any], device: torch.device) -> Iterator[list[Any]]:
    """The same arguments with tensors on `device`; in the end what they hold there is what they hold here.

    Whole storages move, so that views keep their strides and what they share, and bounds are missed as they would be.
    """
    storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def move(argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor) or argument.device.type != "cpu":
            return argument
        here = argument.untyped_storage()
        if here.data_ptr() not in storages:
            there = torch.empty(here.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
            storages[here.data_ptr()] = here, there.copy_(here)
        view = torch.empty(0, dtype=argument.dtype, device=device)
        place = argument.storage_offset(), argument.shape, argument.stride()
        return view.set_(storages[here.data_ptr()][1], *place)  # type: ignore[call-overload]

    yield [move(argument) for argument in arguments]
    for here, there in storages.values():
        here.copy_(there)


def launch_on_card() -> None:
    """From here on, all compiled kernels of this process."""
    from triton.runtime.jit import JITFunction

    plain = JITFunction.run

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        with moved(arguments, torch.device("cuda")) as there:
            return plain(self, *there, **options)

    JITFunction.run = run
