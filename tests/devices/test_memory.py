"""devices/memory.py: which errors say that memory did not suffice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tidewright.devices.memory import out_of_memory

TOO_MUCH = 1 << 60  # bytes


def test_what_runs_out_of_memory_is_known_by_its_error() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    assert "allocate memory" in out_of_memory(of_torch.value)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(TOO_MUCH, np.uint8)
    assert "Unable to allocate" in out_of_memory(of_numpy.value)
    assert out_of_memory(MemoryError()) == "MemoryError"
    assert out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel")).startswith("CUDA error")
    long = out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried\n to allocate 20.00 MiB. " + "a" * 1000))
    assert long.startswith("CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert len(long) == 300


def test_other_errors_are_not_that() -> None:
    assert out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered")) == ""
    assert out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory")) == ""
    assert out_of_memory(RuntimeError("out of resource: shared memory")) == ""
