"""What a CUDA graph is, without CUDA: the operations and kernels of a run, done again on the same tensors.

All that Python decided while it ran stays decided: numbers, shapes, which operations there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class RecorderOnCpu(TorchDispatchMode):
    """A `Recorder`. Counts the replays by what was recorded first, second, …"""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] | None = None
        self.replays: list[int] = []

    def begin(self) -> None:
        pass

    def watch(self, start: Callable[..., None]) -> Callable[..., None]:
        """The same launch of a kernel, which is recorded, and not what the interpreter does for it."""

        def launch(*arguments: Any) -> None:
            def call() -> None:
                with _disable_current_modes():
                    start(*arguments)

            call()
            if self._calls is not None:
                self._calls.append(call)

        return launch

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        calls: list[Callable[[], None]] = []
        self._calls, number = calls, len(self.replays)
        with self:
            compute()
        self._calls = None
        self.replays.append(0)

        def replay() -> None:
            self.replays[number] += 1
            for call in calls:
                call()

        return replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {one.untyped_storage().data_ptr() for one in tensors((args, kwargs))}
        result = func(*args, **kwargs)
        # Views, and what changes in place, need no copy.
        made = [(at, one) for at, one in enumerate(tensors(result)) if one.untyped_storage().data_ptr() not in given]

        def call() -> None:
            again = tensors(func(*args, **kwargs))
            for at, one in made:
                one.copy_(again[at])

        assert self._calls is not None
        self._calls.append(call)
        return result


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def recording(monkeypatch: pytest.MonkeyPatch, modules: list[Any]) -> RecorderOnCpu:
    """Records what these modules launch."""
    recorder = RecorderOnCpu()
    for module in modules:
        monkeypatch.setattr(module, "start", recorder.watch(module.start))
    return recorder
