"""The device that a configuration asks for, with the attention that suits it."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import Device, DeviceError
from tidewright.devices.cpu.attention import NativeCpuAttention
from tidewright.devices.cpu.device import CpuDevice
from tidewright.devices.cpu.kernels import kernels_of
from tidewright.devices.cpu.step_threads import StepThreads, processor_waits
from tidewright.devices.cuda.head_sizes import LARGEST_HEAD, takes_head
from tidewright.devices.cuda.kernel_cache import keep_kernels
from tidewright.devices.visible_gpus import check_visible
from tidewright.kv_cache.quantized import FP8, INT8, is_quantized

_ATTENTIONS = ("auto", "native", "reference")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CACHE_DTYPES = {**_DTYPES, "fp8": FP8, "int8": INT8}

log = logging.getLogger(__name__)


def dtype_of(name: str) -> torch.dtype:
    """Raises DeviceError."""
    if name not in _DTYPES:
        raise DeviceError(f"dtype {name!r} is not supported; use one of: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def cache_dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of the KV cache's numbers, beside weights of `dtype`. Raises DeviceError."""
    if name == "auto":
        return dtype
    if name not in _CACHE_DTYPES:
        raise DeviceError(f"kv_cache_dtype {name!r} is not supported; use one of: auto, {', '.join(_CACHE_DTYPES)}")
    return _CACHE_DTYPES[name]


def make_device(
    name: str,
    attention: str,
    block_size: int,
    dtype: torch.dtype,
    head_dim: int,
    adapt_threads: bool = False,
    cache_dtype: torch.dtype | None = None,
) -> Device:
    """`attention`: "native" is that of the device's own kernels, "auto" the fastest that there is for the model.

    `cache_dtype`: of the KV cache; None is `dtype`.
    `adapt_threads`: steps on a CPU use fewer threads while other processes use the cores, where results allow it.

    Raises:
        DeviceError: there is no such device here, or no such attention for it.
    """
    device = _torch_device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # kernels and graphs go to the current one; of ranks, placement.py made it so
    if attention not in _ATTENTIONS:
        raise DeviceError(f"attention {attention!r} does not exist; there is: {', '.join(_ATTENTIONS)}")
    if attention != "reference":
        lack = _lack_on_cpu(dtype, cache_dtype or dtype) if device.type == "cpu" else _lack_on_cuda(head_dim)
        if lack and attention == "native":
            raise DeviceError(f"attention 'native' needs {lack}; choose 'auto'")
        if lack and (device.type == "cuda" or kernels_of(dtype) is not None):
            log.warning("attention is the reference's, which is slow: the kernels need %s", lack)
        attention = "reference" if lack else "native"
    if device.type == "cpu":
        # The kernels' results do not depend on the number of threads; those of other libraries may.
        adapts = adapt_threads and kernels_of(dtype) is not None
        threads = StepThreads(torch.get_num_threads(), processor_waits() if adapts else None)
        return CpuDevice(
            NativeCpuAttention() if attention == "native" else ReferenceAttention(block_size, device), threads
        )
    if attention == "native":
        keep_kernels()
        from tidewright.devices.cuda.device import CudaDevice  # triton, which others don't need

        return CudaDevice(device)
    return Device(device, ReferenceAttention(block_size, device))


def _lack_on_cpu(dtype: torch.dtype, cache_dtype: torch.dtype) -> str:
    """What the kernels need and there is not; empty if nothing."""
    if kernels_of(dtype) is not None:
        if cache_dtype == dtype or is_quantized(cache_dtype):
            return ""
        return f"a KV cache in {dtype}, as the weights, in fp8 or in int8, not in {cache_dtype}"
    return f"float32 or bfloat16, and a C++ compiler, not {dtype} (the log tells if the compiler failed)"


def _lack_on_cuda(head_dim: int) -> str:
    if not takes_head(head_dim):
        return f"even head sizes up to {LARGEST_HEAD}, not {head_dim}"
    return "" if find_spec("triton") else "PyPI's triton (pip install tidewright[gpu])"


def _torch_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device {name!r} is not one; use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        check_visible([device.index or 0], f"device {name!r} needs")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    return device
