"""A GPU for tests of what the host does: torch's device "meta", whose tensors have no content. Who asks for it fails.

No kernel runs; what comes back from the device is 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.interpreted import interpreted
from tidewright.devices.memory import DeviceMemory
from tidewright.engine import model_runner

with interpreted():
    from tidewright.devices.cuda.device import CudaDevice

META = torch.device("meta")


class Memory(DeviceMemory):
    is_bounded = False

    def free(self) -> int:
        return 2**30

    def capacity(self) -> int:
        return self.free()


class Crossings(TorchDispatchMode):
    """Notes what crosses between the host and the device. Of operations that mix both, only copies may."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        # A number that became a tensor travels with the launch of the kernel.
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        devices = {one.device.type for one in given}
        if name in ("to", "_to_copy") and "device" in kwargs:
            devices.add(torch.device(kwargs["device"]).type)
        if name == "lift_fresh" and devices == {"meta"}:
            self.seen.append("torch.tensor")  # which copies from pageable memory
        if devices <= {"meta"} or devices <= {"cpu"}:
            return func(*args, **kwargs)
        assert name in ("copy_", "to", "_to_copy"), f"{name} of tensors in two places"
        if "device" in kwargs and torch.device(kwargs["device"]).type == "cpu":
            self.seen.append("to the host" if kwargs.get("non_blocking") else "waits for the host")
            return torch.zeros(given[0].shape, dtype=given[0].dtype)
        is_async = kwargs.get("non_blocking") or args[2:] == (True,)
        self.seen.append("to the device" if is_async else "waits for the device")
        return func(*args, **kwargs)


class Indices(TorchFunctionMode):
    """Notes lists that index a tensor: torch copies them to its device, and no operation shows it."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == META:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self._seen += ["an index" for one in index if isinstance(one, list | range | np.ndarray)]
        return func(*args, **(kwargs or {}))


def contentless(monkeypatch: pytest.MonkeyPatch, start: Callable[..., None] = lambda *_: None) -> CudaDevice:
    """The device of engines that are made from now on; `start` gets the launches of kernels."""
    device = CudaDevice(META, Memory(META))
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)
    for name, module in [*sys.modules.items()]:
        if name.startswith("tidewright.devices.cuda.") and hasattr(module, "start"):
            monkeypatch.setattr(module, "start", start)
    return device
