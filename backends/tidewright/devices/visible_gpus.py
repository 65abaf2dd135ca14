"""The GPUs that torch sees: the host's, or those of CUDA_VISIBLE_DEVICES, which are numbered from 0 anew."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from tidewright.devices.base import DeviceError


def check_visible(gpus: Sequence[int], wants: str) -> None:
    """Before anything is loaded.

    Args:
        wants: begins the message: "device 'cuda:4' needs".

    Raises:
        DeviceError: torch does not see all of them.
    """
    seen = torch.cuda.device_count()
    if max(gpus) >= seen:
        plural = "GPU" if len(gpus) == 1 else "GPUs"
        raise DeviceError(f"{wants} {plural} {', '.join(map(str, gpus))}, but torch sees {seen} GPUs{_why(seen)}")


def _why(seen: int) -> str:
    if torch.version.cuda is None:
        return ": this torch is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f", as CUDA_VISIBLE_DEVICES is {visible!r}"
    return "" if seen else "; `nvidia-smi` tells whether the driver sees any"
