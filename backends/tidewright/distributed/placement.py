"""Which device, and how much of its memory, a rank takes on its host."""

from __future__ import annotations

import msgspec
import torch

from tidewright.devices.visible_gpus import check_visible
from tidewright.distributed.gpu_choice import gpus_of
from tidewright.engine.messages import EngineConfig


def resolve(config: EngineConfig) -> EngineConfig:
    """On rank 0: "auto" becomes the kind that this host has. The other ranks are told, as all need the same kind."""
    if config.is_onnx or config.device != "auto":  # onnxruntime knows itself which GPUs it can use
        return config
    return msgspec.structs.replace(config, device="cuda" if torch.cuda.is_available() else "cpu")


def place(config: EngineConfig, local_rank: int) -> EngineConfig:
    """The configuration for one of `config.local_ranks` ranks on this host.

    On a CPU the ranks divide the share of memory that the KV cache may take, and the cores (step_threads.py).

    Raises:
        DeviceError: this host lacks a GPU for one of its ranks, whichever.
        GpuChoiceError: `device` names too few, or too many.
    """
    config = resolve(config)
    ranks = config.local_ranks
    if config.device.startswith("cuda") and not config.is_onnx:
        gpus = gpus_of(config.device, ranks)
        whose = f"the {ranks} ranks of this host need" if ranks > 1 else f"device {config.device!r} needs"
        check_visible(gpus, whose)
        return msgspec.structs.replace(config, device=f"cuda:{gpus[local_rank]}")
    memory = config.kv_cache_memory
    if memory.endswith("%") and ranks > 1:
        memory = f"{float(memory[:-1]) / ranks:g}%"
    return msgspec.structs.replace(config, kv_cache_memory=memory)


def take_place(config: EngineConfig, local_rank: int) -> EngineConfig:
    """`place`, and its GPU is this thread's current one from here on.

    To be called before anything else touches CUDA: kernels, streams, graphs and NCCL go to the current device, and each
    other one that is touched keeps a context of some hundred MiB.
    """
    placed = place(config, local_rank)
    if placed.device.startswith("cuda") and not placed.is_onnx:
        torch.cuda.set_device(placed.device)
    return placed
