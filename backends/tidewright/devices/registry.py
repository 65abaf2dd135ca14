"""The device that a configuration asks for, with the attention that suits it."""

from __future__ import annotations

import torch

from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import Device, DeviceError
from tidewright.devices.cpu.attention import NativeCpuAttention
from tidewright.devices.cpu.device import CpuDevice
from tidewright.devices.cpu.kernels import kernels_of

_ATTENTIONS = ("native", "reference")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_of(name: str) -> torch.dtype:
    """Raises DeviceError."""
    if name not in _DTYPES:
        raise DeviceError(f"dtype {name!r} is not supported; use one of: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def make_device(name: str, attention: str, block_size: int, dtype: torch.dtype) -> Device:
    """`attention` "auto" is the fastest that the device has for `dtype`.

    Raises:
        DeviceError: there is no such device here, or no such attention for it.
    """
    device = _torch_device(name)
    native = device.type == "cpu" and kernels_of(dtype) is not None
    if attention == "auto":
        attention = "native" if native else "reference"
    if attention not in _ATTENTIONS:
        raise DeviceError(f"attention {attention!r} does not exist; there is: {', '.join(_ATTENTIONS)}")
    if attention == "native" and not native:
        raise DeviceError(
            f"attention 'native' needs a CPU, float32 or bfloat16, and a C++ compiler, not {device} and {dtype}"
            " (the log tells if the compiler failed); choose 'auto'"
        )
    reference = ReferenceAttention(block_size, device)
    if device.type == "cpu":
        return CpuDevice(NativeCpuAttention() if attention == "native" else reference)
    return Device(device, reference)


def _torch_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device {name!r} is not one; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} GPUs")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    return device
