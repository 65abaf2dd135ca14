"""A device's memory, as weights, KV cache and steps take it; here as torch knows it of a GPU."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

import torch
from torch import nn

from tidewright.kv_cache.budget import AUTO_GPU

PATIENCE = 5.0  # seconds that an engine waits for the memory of the one whose place it takes
_POLL = 0.1  # seconds
# Words of errors that have no type of their own: torch's, the C library's through torch, a C++ library's,
# onnxruntime's, cuBLAS's, and the driver's as torch, onnxruntime, Triton's language and NCCL quote it.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "Failed to allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA failure 2: out of memory",
    "[CUDA]: out of memory",
    "Cuda failure 2 'out of memory'",
)
_LONGEST = 300  # characters of such an error; torch's goes on with advice about its settings


class DeviceMemory:
    kv_budget = AUTO_GPU
    """What `kv_cache_memory: auto` stands for."""
    is_bounded = True
    """What does not fit fails, so sizes are checked ahead and the largest step is measured."""
    reserves = False
    """What `zeros` gives takes memory only when it is written to, and can be given back in parts by `release`."""

    def __init__(self, torch_device: torch.device) -> None:
        self._torch_device = torch_device

    def __str__(self) -> str:
        return str(self._torch_device)

    def free(self) -> int:
        """Bytes."""
        return torch.cuda.mem_get_info(self._torch_device)[0]

    def capacity(self) -> int:
        """Bytes, free or not."""
        return torch.cuda.mem_get_info(self._torch_device)[1]

    def await_free(self, size: int, patience: float) -> bool:
        """Whether so many bytes are free within `patience` seconds: those of a process that died come back late."""
        deadline = time.monotonic() + patience
        while self.free() < size:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True

    def measure_peak(self, run: Callable[[], object]) -> int:
        """Bytes that `run` takes at most, beyond what is taken before and what stays outside of torch's allocator."""
        self.trim()
        before = torch.cuda.memory_allocated(self._torch_device)
        torch.cuda.reset_peak_memory_stats(self._torch_device)
        run()
        torch.cuda.synchronize(self._torch_device)
        return torch.cuda.max_memory_allocated(self._torch_device) - before

    def trim(self) -> None:
        """Gives back what the allocator keeps without need, so that it counts as free and is not in fragments."""
        torch.cuda.synchronize(self._torch_device)
        torch.cuda.empty_cache()

    def zeros(self, dimensions: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(dimensions, dtype=dtype, device=self._torch_device)

    def release(self, tensor: torch.Tensor) -> None:
        """Its content is of no use: the memory goes back. The tensor stays, and takes memory again when written to."""

    def place_weights(self, model: nn.Module) -> None:
        """To be called before they are loaded."""


def out_of_memory(error: Exception) -> str:
    """What it says, if it is that memory did not suffice; else empty.

    Torch has a type for GPUs only; a CPU's allocators, the driver and other libraries raise others, and the kernel's
    refusal to map memory is an OSError. The error itself keeps all tensors of the frames that it came through.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    known = known or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    # onnxruntime's types have no base of their own.
    is_worded = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")
    if known or (is_worded and any(words in text for words in _OUT_OF_MEMORY)):
        return text[:_LONGEST]
    return ""
